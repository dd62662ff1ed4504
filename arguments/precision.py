"""Which precision a run computes in: what its hardware multiplies fastest, unless the flags say otherwise."""

import math
import time
from dataclasses import dataclass, field
from functools import cache

import torch
from loguru import logger
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from arguments.command_line import UserError


def native_bf16(gpu: bool) -> bool:
    """Whether bfloat16 matrix products run in hardware: on a GPU from Ampere on, or a CPU with avx512_bf16 or AMX."""
    if gpu:
        return torch.cuda.get_device_capability()[0] >= 8
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def cpu_gain_by_bf16() -> float:
    """How many times as fast as float32 matrices this CPU multiplies bfloat16 ones: measured, in 0.01 to 0.04 s.

    Half as fast on an Intel Xeon with avx512_bf16, without AMX. What counts is the time of a single thread, which
    other work on the machine hardly changes.
    """
    threads, least = torch.get_num_threads(), {torch.float32: math.inf, torch.bfloat16: math.inf}
    torch.set_num_threads(1)
    for _ in range(5):
        for dtype in least:
            first, second = torch.ones(256, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
            started = time.thread_time()
            first @ second
            least[dtype] = min(least[dtype], time.thread_time() - started)
    torch.set_num_threads(threads)
    return least[torch.float32] / least[torch.bfloat16]


def best_precision(gpu: bool | None = None, sampling: bool = False) -> str:
    """What this hardware computes fastest in: bf16 where it is native, fp16 on other GPUs, else fp32.

    A CPU that is slower in its native bf16 takes fp32, but not for `sampling`, which reads weights more than it
    multiplies. `gpu`: whether it is this machine's GPU or its CPU; None: a GPU if there is one.
    """
    gpu = torch.cuda.is_available() if gpu is None else gpu
    if native_bf16(gpu) and (gpu or sampling or cpu_gain_by_bf16() > 1):
        return "bf16"
    return "fp16" if gpu else "fp32"


def frozen_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of a model that are not trained, but for heads and what is quantised already."""
    models = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = [head for part in models if (head := part.get_output_embeddings()) is not None]
    heads = {id(weight) for head in found for weight in head.parameters()}  # also within peft's wrapper of one
    linear = [layer for part in models for layer in part.modules() if type(layer) is nn.Linear]
    frozen = {id(layer.weight): layer for layer in linear if not layer.weight.requires_grad}
    return [layer for key, layer in frozen.items() if key not in heads and layer.weight.is_floating_point()]


@dataclass
class PrecisionArguments:
    """Precision of matrix products; mixed into RunArguments."""

    precision: str = field(
        default="auto",
        metadata={
            "help": "Matrix products of the training step: auto (bf16 where the hardware is fast at it, fp16 on older "
            "GPUs, else fp32), bf16, fp16 or fp32. --bf16 and --fp16 say the same. Trained weights stay in float32.",
            "choices": ["auto", "bf16", "fp16", "fp32"],
        },
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "Same as --precision bf16; False: not bf16.", "nargs": "?", "const": True}
    )

    def _choose_precision(self):
        asked = "bf16" if self.bf16 else "fp16" if self.fp16 else self.precision
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 contradict each other: give one")
        if self.precision not in ("auto", asked):
            raise UserError(f"--precision {self.precision} and --{asked} contradict each other")
        if asked == "fp16" and self.use_cpu:
            logger.warning("fp16 needs a GPU: taking what this CPU does best instead")
            asked = "auto"
        if asked == "auto":
            asked = best_precision(gpu=not self.use_cpu)
            if asked == "bf16" and self.bf16 is False:
                asked = "fp32" if self.use_cpu else "fp16"
        self.precision, self.bf16, self.fp16 = asked, asked == "bf16", asked == "fp16"
        device = f"CPU, {torch.get_num_threads()} threads" if self.use_cpu else torch.cuda.get_device_name()
        logger.info(f"Device {device}; training in {asked}, trained weights in float32")

    def avoid_casts(self, model: nn.Module) -> None:
        """Leave out casts that autocast would make, or undo, in every matrix product: the same numbers, sooner.

        peft widens each input to the float32 of its matrices, which autocast then narrows again. And in bf16, frozen
        linear weights are stored as what autocast casts them to: on a CPU these casts cost most in decoding, where
        sampling a rollout took 5.6 s without them and 7.2 s with them, in two series.
        """
        for layer in model.modules() if self.bf16 or self.fp16 else ():
            if isinstance(layer, BaseTunerLayer):
                layer.cast_input_dtype_enabled = False
        for layer in frozen_linears(model) if self.bf16 else ():
            layer.to(torch.bfloat16)
