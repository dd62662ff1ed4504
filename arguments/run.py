"""How a run behaves: precision, where to go on, what it leaves behind."""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from loguru import logger
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from arguments.base import other_base, record_base
from arguments.command_line import Fault, UserError

POSITIVE = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_steps",
    "eval_steps",
)
PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
SEAL = "seal.json"  # in a checkpoint: which stage made it, size and hash of each of its files


def native_bf16() -> bool:
    """Whether bfloat16 matrix products run in hardware: Ampere and newer, or a CPU with avx512_bf16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass
class RunArguments:
    """Mixed into a stage's TrainingArguments: other defaults, precision by hardware, resume, loss curves."""

    output_dir: str = field(
        default="", metadata={"help": "Where adapter, tokenizer, metrics and curves go. Required."}
    )
    fresh: bool = field(
        default=False,
        metadata={"help": "Start over. By default a run goes on from the newest checkpoint in output_dir."},
    )
    do_train: bool = field(default=True, metadata={"help": "Train."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on held-out records."})
    precision: str = field(
        default="auto",
        metadata={
            "help": "Matrix products of the training step: auto (bf16 where the hardware has it, fp16 on older GPUs, "
            "else fp32), bf16, fp16 or fp32. --bf16 and --fp16 say the same. Trained weights stay in float32.",
            "choices": ["auto", "bf16", "fp16", "fp32"],
        },
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Same as --precision bf16; False: not bf16.", "nargs": "?", "const": True}
    )
    activation_checkpointing: bool | None = field(
        default=False,
        metadata={"help": "Recompute activations: less memory, about 30%% slower.", "nargs": "?", "const": True},
    )
    gradient_checkpointing: bool | None = field(default=None, metadata={"help": "Old name of the flag above."})
    plan: bool = field(
        default=False,
        metadata={
            "help": "Print parameters, memory by role, disk, tokens and steps, and whether it fits; then stop. "
            "Reads no weights."
        },
    )
    report_to: None | str | list[str] = field(default="tensorboard", metadata={"help": "tensorboard, wandb, none ..."})
    logging_steps: float = field(default=10, metadata={"help": "Log every that many optimizer steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept; older ones are deleted."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are scaled down to this norm."})

    def __post_init__(self):
        if not self.output_dir:
            raise UserError("--output_dir is missing: name the folder for this stage's adapter and metrics")
        if (Path(self.output_dir) / "merge.json").exists() and not self.fresh:
            raise UserError(f"{self.output_dir} already holds a merged model: --fresh trains it anew and replaces it")
        if Path(self.output_dir).is_file():
            raise UserError(f"--output_dir {self.output_dir} is a file: name a folder")
        asked = str(self.resume_from_checkpoint or "")
        if asked.lower() not in ("", "true", "false") and not Path(asked).is_dir():
            raise UserError(f"--resume_from_checkpoint {asked} is no folder: name a checkpoint-N of an earlier run")
        self.fresh |= asked.lower() == "false"
        if not (self.do_train or self.do_eval):
            raise UserError("--do_train False and --do_eval False leave nothing to do")
        if self.label_smoothing_factor or not self.average_tokens_across_devices:
            raise UserError("--label_smoothing_factor and --average_tokens_across_devices False: not supported here")
        for flag in POSITIVE:
            if (value := getattr(self, flag)) is not None and not value > 0:  # also true for NaN
                raise UserError(f"--{flag} is {value}, expected a number above 0")
        if self.hub_token:  # saved with the arguments, it would be lying in every checkpoint
            os.environ["HF_TOKEN"], self.hub_token = self.hub_token, None
        self._choose_precision()
        if not torch.cuda.is_available():
            self.use_cpu = True
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(self.output_dir) / "runs"))
        super().__post_init__()
        if self.n_gpu > 1:  # transformers would wrap the model in DataParallel: slow, and not what is tested
            logger.warning(
                f"{self.n_gpu} GPUs and one process: using the first. scripts/run_*.sh start one process on each, as "
                f"does torchrun --nproc_per_node {self.n_gpu}"
            )
            self._n_gpu = 1

    def _choose_precision(self):
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else self.precision
        if self.precision not in ("auto", asked):
            raise UserError(f"--precision {self.precision} and --{asked} contradict each other")
        if asked == "fp16" and not torch.cuda.is_available():
            logger.warning("fp16 needs a GPU: taking what this CPU does best instead")
            asked = "auto"
        if asked == "auto":
            asked = (
                "bf16" if native_bf16() and self.bf16 is not False else "fp16" if torch.cuda.is_available() else "fp32"
            )
        self.precision, self.bf16, self.fp16 = asked, asked == "bf16", asked == "fp16"
        device = (
            torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
        )
        logger.info(f"Device {device}; training in {asked}, trained weights in float32")

    def checkpoint(self, base: str) -> str | None:
        """The checkpoint to go on from: the one asked for, else the newest whole one in output_dir, else None.

        Raises:
            UserError: when another stage made it, or it was trained on another base model than `base`.
        """
        asked = self.resume_from_checkpoint
        if asked and str(asked).lower() not in ("true", "false"):
            return asked
        if not Path(self.output_dir).is_dir():
            return None
        if self.fresh:
            with self.main_process_first(desc="clearing the output folder"):
                clear_output(Path(self.output_dir))
            return None
        for found in reversed(sort_checkpoints(self.output_dir)):
            if fault := checkpoint_fault(Path(found)):
                logger.warning(f"Not going on from {found}: {fault}")
            elif (made_by := json.loads((Path(found) / SEAL).read_text())["stage"]) != type(self).__name__:
                raise UserError(
                    f"{self.output_dir} holds checkpoints of another stage ({made_by}): name another --output_dir, or "
                    "--fresh to replace them"
                )
            elif other := other_base(Path(found), base):
                raise UserError(
                    f"{found} was not trained on {base}: {other}. Name its own base, another --output_dir, or --fresh "
                    "to start over"
                )
            else:
                logger.info(f"Going on from {found} (--fresh starts over)")
                warn_of_changes(Path(found))
                return found
        return None

    def keep_casts(self, model: torch.nn.Module) -> None:
        """Leave out casts that autocast makes or takes back in every product: the same numbers, sooner.

        peft widens each input to the float32 of its matrices, which autocast then narrows again. And in bf16 frozen
        linear weights, but for heads, are kept as what autocast casts them to: on a CPU that costs most in decoding, a
        rollout's sampling took 5.6 s without and 7.2 s with it, in two series.
        """
        for layer in model.modules() if self.bf16 or self.fp16 else ():
            if isinstance(layer, BaseTunerLayer):
                layer.cast_input_dtype_enabled = False
        if not self.bf16:
            return
        models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        heads = {id(head.weight) for part in models if (head := part.get_output_embeddings()) is not None}
        for layer in (layer for part in models for layer in part.modules() if type(layer) is torch.nn.Linear):
            if not layer.weight.requires_grad and id(layer.weight) not in heads and layer.weight.is_floating_point():
                layer.to(torch.bfloat16)

    @property
    def steps_between_saves(self) -> int:
        """Checkpoints may only fall behind a multiple of that many optimizer steps."""
        return 1

    def callbacks(self) -> list[TrainerCallback]:
        """What every stage's trainer does beside training."""
        return [CheckpointSeal(), StopAtSignal(self.steps_between_saves), FiniteGradients()]

    def finish(self, trainer) -> None:
        """Add the evaluation before training and the peak memory to all_results.json; write state and curves."""
        if not trainer.is_world_process_zero():
            return
        trainer.save_state()
        run = {"script": Path(sys.argv[0]).name, "arguments": without_secrets(sys.argv[1:])}
        run["versions"] = {name: version(name) for name in PACKAGES}
        (Path(self.output_dir) / "run.json").write_text(json.dumps(run, ensure_ascii=False, indent=1), "utf-8")
        record_base(Path(self.output_dir))
        peak = {"peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}  # kiB on Linux
        if torch.cuda.is_available():
            peak["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        start = [row for row in trainer.state.log_history if row.get("step") == 0]
        first = next((row for row in start if any(key.startswith("eval_") for key in row)), {})
        before = {f"{key}_before": value for key, value in first.items() if key.startswith("eval_")}
        path = Path(self.output_dir) / "all_results.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(results | before | peak, indent=4, sort_keys=True))
        plot_curves(trainer.state.log_history, Path(self.output_dir))


def without_secrets(argv: list[str]) -> list[str]:
    """A command line's words, but for the value of --hub_token."""
    words = []
    for word in argv:
        hidden = words[-1:] == ["--hub_token"] or word.startswith("--hub_token=")
        words.append("..." if hidden else word)
    return words


class CheckpointSeal(TrainerCallback):
    """Writes the size and hash of every file of a checkpoint into it once all are there: no seal, not whole."""

    def on_save(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.distributed.barrier()  # every rank saves its own random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / SEAL).unlink(missing_ok=True)
            record_base(folder)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            seal = {"stage": type(args).__name__, "arguments": without_secrets(sys.argv[1:])}
            seal["files"] = {str(p.relative_to(folder)): digest(p) for p in files}
            (folder / "seal.tmp").write_text(json.dumps(seal, indent=1))
            os.replace(folder / "seal.tmp", folder / SEAL)


class StopAtSignal(TrainerCallback):
    """SIGTERM or SIGINT: save a checkpoint, end, exit with 128 + the signal's number. A second one exits at once."""

    def __init__(self, steps_between_saves: int):
        self.signal, self.steps_between_saves = 0, steps_between_saves

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(self, number: int, frame) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        logger.warning(f"{signal.Signals(number).name}: saving a checkpoint, then ending (once more: ending at once)")

    def on_step_end(self, args, state, control, **kwargs):
        received = torch.tensor(self.signal, device=args.device)
        if args.world_size > 1:  # all ranks end behind the same step
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        if received and state.global_step % self.steps_between_saves == 0:
            self.signal = int(received)
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal and state.global_step < state.max_steps:
            logger.warning(f"Ended behind step {state.global_step}: the same command goes on from there")
            raise SystemExit(128 + self.signal)


class FiniteGradients(TrainerCallback):
    """Ends the run before a step whose gradients are not finite, so that no such number reaches a weight.

    In fp16 the loss scale is too high at times: the scaler skips such steps and lowers it. Only three in a row at a
    scale below 1, where nothing is left to lower, end the run.
    """

    def __init__(self):
        self.in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if torch.nn.utils.get_total_norm(gradients).isfinite():
            self.in_a_row = 0
            return
        scaler = optimizer.scaler
        self.in_a_row += scaler is None or scaler.get_scale() < 1
        if self.in_a_row >= (1 if scaler is None else 3):
            batch = f"batch {state.global_step + 1} (epoch {state.epoch:.3f})"
            raise Fault(
                f"the gradients of {batch} are not finite: nothing of it was learned or saved. Look at its records "
                "with --preview, lower --learning_rate, or try --precision fp32; the last checkpoint is whole"
            )


def digest(path: Path) -> list:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def checkpoint_fault(folder: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None when it is whole."""
    if not (folder / SEAL).exists():
        return "its saving was interrupted"
    files = json.loads((folder / SEAL).read_text()).get("files")
    if files is None:
        return "an older version saved it"
    broken = [name for name, known in files.items() if not (folder / name).is_file() or digest(folder / name) != known]
    return f"changed since it was saved: {', '.join(broken)}" if broken else None


def warn_of_changes(folder: Path) -> None:
    """Say which flags are not those that the checkpoint was made with."""

    def flags(words: list[str]) -> dict[str, str]:  # of a flag that is given twice the last value counts
        parts = " ".join(words).removeprefix("--").split(" --")
        return dict(part.replace("=", " ", 1).partition(" ")[::2] for part in parts)

    before = json.loads((folder / SEAL).read_text()).get("arguments")
    if before is None:  # an older version saved it
        return
    before, now = flags(before), flags(without_secrets(sys.argv[1:]))
    names = sorted(name for name in before | now if before.get(name) != now.get(name))
    if names:
        changes = [f"--{name} {now.get(name, 'not given')} (was {before.get(name, 'not given')})" for name in names]
        logger.warning(
            f"The command has changed since: {', '.join(changes)}. Learning rate and schedule stay those of the "
            "checkpoint, records are taken from where it stopped"
        )


def clear_output(folder: Path) -> None:
    """Remove an earlier run's checkpoints, merged weights and lines, which would be taken for this run's."""
    merged = [*folder.glob("model*.safetensors*"), folder / "config.json"] if (folder / "merge.json").exists() else []
    told = [folder / f"{name}.jsonl" for name in ("margins", "scores", "samples", "guards")]
    for path in [*folder.glob("checkpoint-*"), *merged, *told, folder / "adapter", folder / "merge.json"]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # another rank may have been first
        else:
            path.unlink(missing_ok=True)


def plot_curves(log_history: list[dict], folder: Path) -> None:
    """Write training_{name}.png for every quantity that training or evaluation logged at least twice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timings = ("runtime", "per_second", "flos", "epoch", "step", "num_tokens")
    names = {key.removeprefix("eval_") for row in log_history for key in row}
    for name in sorted(
        n for n in names if not n.endswith(timings) and not n.startswith(("train_", "seconds_", "accuracy_"))
    ):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for key, label in ((name, "train"), (f"eval_{name}", "held out")):
            points = [(row["step"], row[key]) for row in log_history if isinstance(row.get(key), int | float)]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set(xlabel="optimizer step", ylabel=name.replace("_", " "))
        if axes.lines and max(len(line.get_xdata()) for line in axes.lines) > 1:
            axes.legend()
            figure.savefig(folder / f"training_{name.replace('/', '_')}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
