"""--torch_compile: the model's layers, compiled one by one."""

import os
from dataclasses import dataclass, field

from loguru import logger
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from arguments.command_line import UserError


@dataclass
class CompileArguments:
    """Compiling of the model's layers; mixed into RunArguments."""

    torch_compile: bool = field(
        default=False,
        metadata={
            "help": "Compile the model's layers: a tenth faster on a CPU; the first step takes a minute, or ten "
            "seconds from the cache. Needs a C++ compiler. No effect in RL."
        },
    )

    def _take_over_compiling(self) -> None:
        """Leave what --torch_compile asks for to compile_layers: accelerate would compile the model as a whole."""
        launched = os.environ.pop("ACCELERATE_DYNAMO_BACKEND", "no")  # by accelerate launch
        backend, mode = (self.torch_compile_backend or launched).lower(), self.torch_compile_mode
        asked = self.torch_compile or mode or backend != "no"
        backend = "inductor" if backend == "no" else backend
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        self.compile_settings = {"backend": backend, "mode": mode} if asked else None
        if asked and (self.deepspeed or self.fsdp):
            logger.warning("--torch_compile has no effect with --deepspeed and --fsdp")
            self.compile_settings = None
        elif asked:
            self._check_compiler(backend, mode)

    def _check_compiler(self, backend: str, mode: str | None) -> None:
        from torch._dynamo import list_backends  # a second and a half
        from torch._inductor import list_mode_options
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        if backend not in list_backends(None):
            raise UserError(
                f"--torch_compile_backend {backend} is unknown: expected one of {', '.join(list_backends())}"
            )
        if mode and mode not in list_mode_options():
            raise UserError(
                f"--torch_compile_mode {mode} is unknown: expected one of {', '.join(list_mode_options())}"
            )
        try:
            if backend == "inductor" and self.use_cpu:
                get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UserError(
                "--torch_compile needs a C++ compiler: apt install g++, or name yours in the variable CXX"
            ) from error

    def compile_layers(self, model: nn.Module) -> None:
        """--torch_compile, layer by layer: a few graphs then serve all of them, and rows of any length."""
        if self.compile_settings is None:
            return
        layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not layers:
            logger.warning(f"--torch_compile has no effect: {type(model).__name__} names no layers")
        for layer in layers:  # 64: with and without a mask, training and evaluation, kinds of layers; torch allows 8
            layer.compile(dynamic=True, recompile_limit=64, **self.compile_settings)
