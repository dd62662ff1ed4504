"""How a run behaves: what it refuses, where it resumes, what it writes at its end."""

import json
import math
import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from loguru import logger
from transformers import TrainerCallback, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from arguments.atomic import drop_if_cut, drop_if_no_text, hold_folder, read_json, write_atomically
from arguments.base import facts_of, other_base, record_base
from arguments.checkpoints import (
    SEAL,
    CheckpointSeal,
    check_changes,
    check_contents,
    checkpoint_fault,
    clear_output,
    drop_later,
    left_by_a_run,
    numbered,
    saved_by,
)
from arguments.command_line import UserError, expect, without_secrets
from arguments.compiling import CompileArguments
from arguments.curves import plot_curves
from arguments.data import DataArguments
from arguments.flags import (
    NEEDS,
    WITHOUT_EFFECT,
    check_accelerator_config,
    check_dead_flags,
    check_metric,
    check_objects,
    check_optimizer,
    json_of,
)
from arguments.precision import PrecisionArguments
from arguments.stops import FiniteGradients, FiniteWeights, NamesItsMetric, StopAtSignal
from arguments.telemetry import peak_memory

RANGES = {  # what numpy's seed and PyTorch's AdamW take; bounds included
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1 - 1e-9),
    "adam_beta2": (0, 1 - 1e-9),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "warmup_steps": (0, 2**31),
    "eval_delay": (0, 2**31),
    "neftune_noise_alpha": (0, 2**31),
    "dataloader_num_workers": (0, 2**10),
    "dataloader_prefetch_factor": (1, 2**10),
}
POSITIVE = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "eval_accumulation_steps",
)
BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that a metric steers
HELD_OUT = "eval_tokens", "eval_pairs", "eval_prompts"  # how many there are
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


@dataclass
class RunArguments(PrecisionArguments, CompileArguments):
    """Mixed into a stage's TrainingArguments: other defaults, precision by hardware, resume, loss curves."""

    metrics = {}  # {pattern of a held-out metric that may tell the best checkpoint: is more better?}; empty: any name
    needs = NEEDS  # {flag: the other flag without which it has no effect}
    unused = WITHOUT_EFFECT  # {flag: why it has no effect}

    output_dir: str = field(
        default="", metadata={"help": "Where adapter, tokenizer, metrics and curves go. Required."}
    )
    fresh: bool = field(
        default=False,
        metadata={"help": "Start over. By default a run goes on from the newest checkpoint in output_dir."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint-N to go back to, which deletes the later ones. True: the newest, as by default; "
            "False: --fresh."
        },
    )
    do_train: bool = field(default=True, metadata={"help": "Train."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on held-out records."})
    activation_checkpointing: bool | None = field(
        default=False,
        metadata={"help": "Recompute activations: less memory, about 30%% slower.", "nargs": "?", "const": True},
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of --activation_checkpointing."}
    )
    plan: bool = field(
        default=False,
        metadata={
            "help": "Print parameters, memory by role, disk, tokens and steps, and whether it fits; then stop. "
            "Reads no weights."
        },
    )
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "tensorboard, wandb, swanlab, trackio, none ..."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every that many optimizer steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; older ones are deleted."})

    def __post_init__(self):
        if not self.output_dir:
            raise UserError("--output_dir is missing: name the folder for this stage's adapter and metrics")
        asked = str(self.resume_from_checkpoint or "")
        if self.fresh and asked.lower() == "true":
            raise UserError(
                "--resume_from_checkpoint True goes on from the newest checkpoint, --fresh (--overwrite_output_dir) "
                "deletes them all: leave one of them out"
            )
        self.fresh |= asked.lower() == "false"
        self._check_output()
        if self._names_checkpoint() and not Path(asked).is_dir() and not saved_by(self):  # it may be deleted since
            raise UserError(f"--resume_from_checkpoint {asked} is not a folder: name a checkpoint-N of an earlier run")
        self._refuse_unsupported()
        expect(self, "at least 1, or -1 for --num_train_epochs", lambda x: x >= 1 or x == -1, "max_steps")
        expect(self, "a finite number above 0", lambda x: 0 < x < math.inf, *POSITIVE)
        for flag, (least, most) in RANGES.items():
            expect(self, f"a number from {least} to {most:.10g}", lambda x, a=least, b=most: a <= x <= b, flag)
        if self.hub_token:  # it would be saved with the arguments in every checkpoint
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        # transformers would delete the old ones before the new one is whole; CheckpointSeal does it then
        self.checkpoints_kept, self.save_total_limit = self.save_total_limit, None
        self.base_facts = None  # name and fingerprint of what is trained, once it is loaded
        self.use_cpu |= not torch.cuda.is_available()
        if self.eval_steps and self.do_eval and self.eval_strategy == "no":
            logger.info(f"--eval_steps {self.eval_steps}: taking --eval_strategy steps")
            self.eval_strategy = "steps"
        self._choose_precision()
        self._take_over_compiling()
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(self.output_dir) / "runs"))
        self._check_deepspeed()
        check_objects(self)
        check_dead_flags(self)
        check_metric(self)
        check_accelerator_config(self)
        super().__post_init__()
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            raise UserError("--save_strategy best goes by a metric: name it with --metric_for_best_model")
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise UserError("--save_strategy best saves after evaluations: ask for some, as by --eval_steps 20")
        if self.lr_scheduler_type in BY_METRIC:  # by default they wait for the metric to fall
            mode = "max" if self.greater_is_better else "min"
            self.lr_scheduler_kwargs = {"mode": mode} | (self.lr_scheduler_kwargs or {})
        self._check_reporters()
        check_optimizer(self)
        self._check_schedule()
        alone = self.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
        if (self.deepspeed or self.fsdp) and alone and not torch.cuda.is_available():
            # accelerate would silently use plain DDP
            raise UserError("--deepspeed and --fsdp shard over GPUs, and there is none here: leave them out")
        self._take_one_gpu()

    def _refuse_unsupported(self) -> None:
        """Flags of transformers that would give wrong figures here, or fail only when training starts."""
        if not (self.do_train or self.do_eval):
            raise UserError("--do_train False and --do_eval False leave nothing to do")
        if not self.do_eval and self.eval_strategy != "no":
            raise UserError(f"--do_eval False and --eval_strategy {self.eval_strategy}: leave one of them out")
        if self.label_smoothing_factor or not self.average_tokens_across_devices:
            raise UserError("--label_smoothing_factor and --average_tokens_across_devices False: not supported here")
        if self.dataloader_drop_last:
            raise UserError(
                "--dataloader_drop_last would leave held-out records out of the metrics, and train nothing where one "
                "batch holds all: leave it out"
            )
        if self.label_names not in (None, ["labels"]):
            raise UserError("--label_names: records have one kind of label here, and it needs no name: leave it out")
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise UserError("--use_liger_kernel needs a package that is not installed: pip install liger-kernel")

    def _take_one_gpu(self) -> None:
        """Of several GPUs: transformers would wrap the model in DataParallel, which is slow and not tested."""
        if self.n_gpu <= 1:
            return
        logger.warning(
            f"{self.n_gpu} GPUs and one process: the first works alone, unless --device_map spreads the model. "
            f"scripts/run_*.sh start one process on each, as does torchrun --nproc_per_node {self.n_gpu}"
        )
        self._n_gpu = 1
        if self.fp16 and self.optim == OptimizerNames.ADAMW_TORCH_FUSED:
            # where gradients on two GPUs overflow, as in a first step, torch 2.13's scaler tells the fused one 2,
            # and it skips a step for 1 alone: all weights would be NaN
            self.optim = OptimizerNames.ADAMW_TORCH

    def _check_deepspeed(self) -> None:
        if not self.deepspeed:
            return
        settings = json_of(self, "deepspeed", "scripts/ holds zero2.json and zero3.json")
        if find_spec("deepspeed") is None:
            raise UserError("--deepspeed needs a package that is not installed: pip install deepspeed")
        enabled = settings.get(self.precision, {}).get("enabled")
        if self.precision != "fp32" and not enabled:  # trained_dtype goes by it
            raise UserError(
                f"--deepspeed {self.deepspeed} does not enable {self.precision}: add "
                f'"{self.precision}": {{"enabled": "auto"}} as in scripts/zero2.json, or take --precision fp32'
            )

    def _check_reporters(self) -> None:
        """Refuse now what transformers would find missing only after the model is loaded."""
        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK:
                raise UserError(
                    f"--report_to {name} is unknown: expected {', '.join(INTEGRATION_TO_CALLBACK)} or none"
                )
            if name not in get_available_reporting_integrations():
                raise UserError(f"--report_to {name} is not installed: pip install {name}, or --report_to tensorboard")

    def _check_schedule(self) -> None:
        """Refuse settings that the schedule would find missing when training starts."""
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 0, 1, self.lr_scheduler_kwargs)
        except (TypeError, ValueError) as error:
            name = self.lr_scheduler_type.value
            raise UserError(f"--lr_scheduler_type {name}, with --lr_scheduler_kwargs: {error}") from error

    def _check_output(self) -> None:
        """Refuse an output folder that holds what this run would destroy."""
        output, script = Path(self.output_dir), Path(sys.argv[0]).name
        if file := next((path for path in (output, *output.parents) if path.is_file()), None):
            raise UserError(f"--output_dir {output}: {file} is a file, name a folder")
        if self.fresh:
            return
        if (output / "merge.json").exists():
            raise UserError(f"{output} already holds a merged model: --fresh trains it anew and replaces it")
        if self.do_train and (output / "adapter_config.json").exists() and not left_by_a_run(output):
            raise UserError(
                f"{output} holds an adapter that no run here has left: name another --output_dir, or --fresh to "
                "replace it"
            )
        if not self.do_train and (output / "train_results.json").exists():
            raise UserError(
                f"--do_train False evaluates what --model_name_or_path and --peft_path name, and its figures would "
                f"replace those of the training in {output}: name another --output_dir"
            )
        run = read_json(output / "run.json") or {}
        if run.get("script", script) != script:
            raise UserError(
                f"{output} holds what {run['script']} made: name another --output_dir, or --fresh to replace it"
            )

    def _names_checkpoint(self) -> bool:
        """Whether --resume_from_checkpoint names a checkpoint."""
        return str(self.resume_from_checkpoint or "").lower() not in ("", "true", "false")

    def checkpoint(self, base: str, adapter: str | None = None) -> str | None:
        """The checkpoint to resume from: the one asked for, else the newest whole one in output_dir, else None.

        The command that asks for one, given again after a kill, goes on from the newest that it has saved since. Later
        checkpoints than the one it goes on from are deleted.

        `base` and `adapter` are what the run starts from; --fresh clears output_dir but leaves them alone.

        Raises:
            UserError: when another stage made it, when it was trained on a base model other than `base`, or when the
                one asked for is not whole; when another run is writing into output_dir.
        """
        self.base_facts = facts_of(base)
        starts_over = self.fresh and not self._names_checkpoint()
        with self.main_process_first(local=False, desc="holding the output folder"):  # the others look into it then
            if self.process_index == 0 and not hold_folder(Path(self.output_dir)):
                raise UserError(
                    f"--output_dir {self.output_dir}: another run is writing there. Wait for its end, or name another "
                    "folder"
                )
            if self.process_index == 0 and starts_over:
                clear_output(Path(self.output_dir), [base, adapter or base])
        if starts_over:
            return None
        asked = [saved_by(self) or self.resume_from_checkpoint] if self._names_checkpoint() else []
        for found in asked or map(str, reversed(numbered(Path(self.output_dir)))):
            if fault := checkpoint_fault(Path(found)):
                if asked:
                    raise UserError(f"--resume_from_checkpoint {found}: {fault}. Name another one, or True")
                logger.warning(f"Not going on from {found}: {fault}")
                continue
            self._check_origin(Path(found), base)
            logger.info(f"Going on from {found} (--fresh starts over)")
            self.eval_on_start = False  # it would not be of what the run started from
            check_contents(Path(found), self)
            check_changes(Path(found))
            if asked and self.process_index == 0:
                drop_later(Path(self.output_dir), Path(found))
            return found
        return None

    def _check_origin(self, found: Path, base: str) -> None:
        """Check that a whole checkpoint is of this stage and was trained on `base`."""
        if (made_by := json.loads((found / SEAL).read_text())["stage"]) != type(self).__name__:
            raise UserError(
                f"{found.parent} holds checkpoints of another stage ({made_by}): name another --output_dir, or "
                "--fresh to replace them"
            )
        if other := other_base(found, base):
            raise UserError(
                f"{found} was not trained on {base}: {other}. Name its own base, another --output_dir, or --fresh "
                "to start over"
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """transformers', but at least one step learns.

        A share is rounded up: of few steps it would be all of them, and the first has a rate of 0.
        """
        return min(super().get_warmup_steps(num_training_steps), max(num_training_steps - 1, 0))

    @property
    def order_seed(self) -> int:
        """Of the order of training rows."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def steps_between_saves(self) -> int:
        """Checkpoints fall on multiples of this many optimizer steps."""
        return 1

    def callbacks(self) -> list[TrainerCallback]:
        """What every stage's trainer does besides training."""
        drop_if_cut(Path(self.output_dir) / "all_results.json")  # transformers reads it before adding to it
        for folder in (Path(self.output_dir), *numbered(Path(self.output_dir))):  # also where a kill left no seal
            drop_if_no_text(folder / "README.md")  # as peft does
        ends = StopAtSignal(self.steps_between_saves), FiniteGradients(), FiniteWeights(), NamesItsMetric()
        return [*ends, CheckpointSeal()]

    def finish(self, trainer, data_args: DataArguments) -> None:
        """Add the evaluation before training and the peak memory to all_results.json; write data, state and curves."""
        if not trainer.is_world_process_zero():
            return
        trainer.save_state()
        run = {"script": Path(sys.argv[0]).name, "arguments": without_secrets(sys.argv[1:])}
        run["versions"] = {name: version(name) for name in PACKAGES}
        write_atomically(Path(self.output_dir) / "run.json", json.dumps(run, ensure_ascii=False, indent=1))
        write_atomically(Path(self.output_dir) / "data.json", json.dumps(data_args.facts))
        if (Path(self.output_dir) / "adapter_config.json").exists():
            record_base(Path(self.output_dir), self.base_facts)
        start = [row for row in trainer.state.log_history if row.get("step") == 0]
        first = next((row for row in start if any(key.startswith("eval_") for key in row)), {})
        before = {f"{key}_before": value for key, value in first.items() if key.startswith("eval_")}
        path = Path(self.output_dir) / "all_results.json"
        results = {key: value for key, value in (read_json(path) or {}).items() if not key.endswith("_before")}
        if any(first[name] != results.get(name, first[name]) for name in HELD_OUT if name in first):
            logger.warning("The held-out records are others than when this run began: no figures of before training")
            before = {}
        write_atomically(path, json.dumps(results | before | peak_memory(), indent=4, sort_keys=True))
        plot_curves(trainer.state.log_history, Path(self.output_dir))
