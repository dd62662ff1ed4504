"""Which LoRA: rank, targets, modules to save; or none, to train all weights."""

import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import deepspeed_config

from arguments.base import adapter_config, adapter_folder, check_base
from arguments.command_line import UserError, expect, first_line, given, not_found, one_line
from arguments.lora import quicken
from arguments.model import count_parameters
from arguments.shapes import only_shapes
from arguments.targets import ALL, complete, warn_of_frozen

LORA_FLAGS = {  # and their names in an adapter's config
    "target_modules": "target_modules",
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "modules_to_save": "modules_to_save",
}


@dataclass
class AdapterArguments:
    """The adapter that is trained on top of the frozen base model."""

    use_peft: bool = field(default=True, metadata={"help": "Train a LoRA adapter. False trains all weights."})
    target_modules: str = field(
        default="all", metadata={"help": "Comma list of module names, or all: every linear layer but the head."}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the update: 8 is enough for style and domain."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The update is scaled by lora_alpha / lora_rank."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout before the adapter. 0: it costs a tenth of the speed on a CPU."}
    )
    modules_to_save: str | None = field(
        default=None, metadata={"help": "Comma list of modules trained and saved in full, e.g. embed_tokens,lm_head."}
    )
    peft_path: str | None = field(default=None, metadata={"help": "Continue training this adapter."})
    force: bool = field(
        default=False, metadata={"help": "Accept an adapter (--peft_path, reward model) on a base other than its own."}
    )

    def __post_init__(self):
        if self.peft_path and not self.use_peft:
            raise UserError("--use_peft False trains no adapter, so --peft_path has none to go on from")
        if not self.target_modules.strip(", "):
            raise UserError("--target_modules is empty: a comma list of module names, or all")
        expect(self, "at least 1", lambda x: x >= 1, "lora_rank")
        expect(self, "a finite number above 0", lambda x: 0 < x < math.inf, "lora_alpha")
        expect(self, "a share in [0, 1)", lambda x: 0 <= x < 1, "lora_dropout")

    @property
    def saved_modules(self) -> list[str]:
        return [name.strip() for name in (self.modules_to_save or "").split(",") if name.strip()]

    @property
    def adapter_path(self) -> str | None:
        """peft_path, or its adapter/ after a merge in place."""
        return str(adapter_folder(self.peft_path) or self.peft_path) if self.peft_path else None

    def peft_config(self, task_type: TaskType) -> LoraConfig:
        """The LoRA these flags describe."""
        targets = [name.strip() for name in self.target_modules.split(",") if name.strip()]
        return LoraConfig(
            task_type=task_type,
            target_modules=ALL if targets == ["all"] else targets,
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            modules_to_save=self.saved_modules or None,
        )

    def apply(self, model: nn.Module, task_type: TaskType) -> nn.Module:
        """Return `model` ready to train: with its adapter, or with all weights trainable.

        Raises:
            UserError: when `target_modules` matches nothing, or `peft_path` holds no adapter.
        """
        self._warn_of_idle_flags(task_type)
        if not self.use_peft:
            model = model.to(trained_dtype())
        elif self.peft_path:
            check_base(Path(self.adapter_path), model.config._name_or_path, self.force)
            self._check_task(task_type)
            try:
                model = with_saved_adapter(model, Path(self.adapter_path), "default", trainable=True)
            except (ValueError, OSError, RuntimeError, SafetensorError) as error:
                why = one_line(error) if Path(self.peft_path).is_dir() else not_found(self.peft_path, error)
                raise UserError(f"--peft_path {self.peft_path} is not an adapter for this model: {why}") from error
        else:
            names = [name for name, _ in model.named_modules()]
            for saved in self.saved_modules:
                if not any(name.endswith(saved) for name in names):
                    raise UserError(f"--modules_to_save {saved}: the model has no module of that name")
            linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
            config = self.peft_config(task_type)
            everything = config.target_modules == ALL
            try:
                model = get_peft_model(model, complete(config, model))
            except ValueError as error:
                raise UserError(self._refused(str(error), linear)) from error
            if everything:
                warn_of_frozen(model)
        cast_trained(model)
        quicken(model)
        trained = count_parameters(p for p in model.parameters() if p.requires_grad)
        total = count_parameters(model.parameters())
        logger.info(f"Training {trained:,} of {total:,} parameters ({trained / total:.2%})")
        return model

    def _warn_of_idle_flags(self, task_type: TaskType) -> None:
        """Name the LoRA flags that ask for something but get nothing: without LoRA, or with that of peft_path."""
        folder = adapter_folder(self.peft_path) if self.peft_path else None
        if self.use_peft and not folder:
            return
        asked, found = self.peft_config(task_type), adapter_config(folder) if folder else None
        names = {flag: LORA_FLAGS[flag] for flag in given(self, LORA_FLAGS)}
        idle = [f for f, name in names.items() if not found or getattr(asked, name) != getattr(found, name, None)]
        if idle:
            why = f"the adapter of --peft_path {self.peft_path} keeps its own" if folder else "--use_peft False"
            logger.warning(f"{', '.join('--' + flag for flag in idle)} without effect: {why}")

    def _refused(self, said: str, linear: set[str]) -> str:
        """What peft said against this adapter, behind the flag that it is about."""
        if "lora_dropout" in said:  # the experts of a mixture take none
            return f"--lora_dropout {self.lora_dropout} does not go with this model's experts ({said}): leave it out"
        if "is incompatible with" in said:  # parts of Mamba, and peft names them in quotes
            left = ",".join(sorted(linear - {"lm_head", "score", *re.findall(r"'(\w+)'", said)}))
            return f"--target_modules {self.target_modules}: {said} All but those: --target_modules {left}"
        return f"--target_modules {self.target_modules}: {said}"

    def _check_task(self, wanted: TaskType) -> None:
        """See that peft_path is an adapter of the task that is trained: one of another goes on as that other one."""
        folder = adapter_folder(self.peft_path)
        found = adapter_config(folder).task_type if folder else wanted
        if found is None and wanted == TaskType.SEQ_CLS:  # peft would train the score head and not save it
            raise UserError(
                f"--peft_path {self.peft_path} does not say what it is for: if it scores answers, set "
                f'"task_type": "SEQ_CLS" in {folder}/adapter_config.json; else leave it out'
            )
        if found not in (None, wanted):
            raise UserError(f"--peft_path {self.peft_path} is a {found} adapter, and this stage trains {wanted.value}")


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's folder, by their names there.

    Raises:
        UserError: when it holds none, or not whole ones.
        OSError, ValueError: when there is no such folder, and no adapter of that name on the hub.
    """
    if folder.is_dir() and not any(folder.glob("adapter_model.*")):
        raise UserError(f"{folder} lacks adapter_model.safetensors, the weights of its adapter: copy the whole folder")
    try:
        return load_peft_weights(str(folder), device="cpu")
    except (SafetensorError, OSError, ValueError, EOFError) as error:
        if not folder.is_dir():
            raise
        raise UserError(f"{folder} holds no whole adapter weights ({first_line(error)})") from error


def with_saved_adapter(model: nn.Module, folder: Path, name: str, trainable: bool) -> PeftModel:
    """`model` with the adapter of a folder under `name`, beside those it has; for --plan, one of the same shapes.

    Raises:
        UserError: when the folder lacks some of its tensors or names them otherwise: peft would make new ones; when it
            holds some of layers that the model does not have: peft would leave them out.
        RuntimeError, ValueError: when it does not fit the model in another way.
    """
    if only_shapes():
        config = adapter_config(folder)
        config.inference_mode = not trainable
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, name)
        model.add_adapter(name, config)
        return model
    tensors = saved_tensors(folder)
    if isinstance(model, PeftModel):
        model.load_adapter(folder, name, is_trainable=trainable)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            model = PeftModel.from_pretrained(model, folder, name, is_trainable=trainable)
    # once more, as the call above does not tell what fitted
    loaded = set_peft_model_state_dict(model, tensors, name)
    if missing := [key for key in loaded.missing_keys if "lora_" in key and f".{name}" in key]:
        raise UserError(
            f"{folder} does not fit this base: it lacks {missing[0]} and {len(missing) - 1} more, or names them "
            "otherwise. Name the base it was trained on, or save it again from the model as peft made it"
        )
    if surplus := [key for key in loaded.unexpected_keys if "lora_" in key]:
        raise UserError(
            f"{folder} does not fit this base: it holds {surplus[0]} and {len(surplus) - 1} more, for which by its "
            "config there is no layer. Name the base it was trained on, or save it again from peft's own model"
        )
    return model


def trained_dtype() -> torch.dtype:
    """Dtype of trained weights: float32, as float16 gradients cannot be scaled and bfloat16 loses small updates.

    DeepSpeed computes in the weights' own dtype, without autocast, and keeps float32 copies that it trains.
    """
    config = deepspeed_config() or {}
    halves = (("bf16", torch.bfloat16), ("fp16", torch.float16))
    return next((dtype for name, dtype in halves if config.get(name, {}).get("enabled")), torch.float32)


def cast_trained(model: nn.Module) -> None:
    """Cast trained weights to trained_dtype; call it again after adding an adapter.

    peft casts LoRA's own matrices, but not a score head or other modules saved in full. Those get hooks, for where
    autocast is off: inputs are cast to float32 and, inside the base model, outputs back to the dtype of the frozen
    layers that follow. No layer follows a head.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained_dtype())
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    inside = {id(module) for part in models for module in part.base_model.modules()}
    for wrapper in (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)):
        for module in wrapper.modules_to_save.values():
            wide = next(module.parameters()).dtype == torch.float32
            if not wide or cast_inputs in module._forward_pre_hooks.values():
                continue
            module.register_forward_pre_hook(cast_inputs, with_kwargs=True)
            if id(wrapper) in inside:
                frozen = wrapper.original_module  # whose dtype an evaluation may change (--bf16_full_eval)
                module.register_forward_hook(lambda *c, frozen=frozen: cast(c[-1], next(frozen.parameters()).dtype))


def cast_inputs(module: nn.Module, inputs: tuple, named: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: inputs in the dtype of the module's weights, which FSDP gathers in 16 bits."""
    dtype = next(module.parameters()).dtype
    return cast(inputs, dtype), {name: cast(value, dtype) for name, value in named.items()}


def cast(value, dtype: torch.dtype):
    """Floating-point tensors, also those in tuples, in `dtype`; everything else as it is."""
    if isinstance(value, tuple):
        return tuple(cast(part, dtype) for part in value)
    return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
