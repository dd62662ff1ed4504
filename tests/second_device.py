"""A script run as on a Tesla T4: in fp16 with a loss scale, and on a device on which mixing it with the CPU raises.

    python tests/second_device.py supervised_finetuning.py --model_name_or_path ...

The device is PyTorch's PrivateUse1 backend, under a name that accelerate takes for a GPU's. Its tensors are real ones
whose kernels run on CPU tensors of the same memory: DLPack hands that over, with another number of device. So
autograd, views, autocast and the GradScaler work as on any device. What it cannot tell: speed, memory, CUDA's kernels.
"""

import ctypes
import runpy
import sys
from functools import cached_property
from pathlib import Path

import torch
from torch import library
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "sdaa"
CPU, EXTENSION = 1, 12  # DLPack's kinds of devices
COPIES = {"aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::set_", "aten::index"}
PUTS = {"aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}  # indices may be on the CPU, as in index
STRICT = {"aten::gather", "aten::index_select", "aten::embedding", "aten::mm", "aten::cat"}  # take no number either
HALF = [
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "addbmm",
    "addmv",
    "mv",
    "baddbmm",
    "einsum",
    "prelu",
    "conv1d",
    "conv2d",
    "conv3d",
    "chain_matmul",
    "scaled_dot_product_attention",
]  # autocast's list for CUDA
FULL = [
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "pow",
    "rsqrt",
    "reciprocal",
    "softplus",
    "layer_norm",
    "group_norm",
    "norm",
    "nll_loss",
    "cosine_similarity",
    "cosine_embedding_loss",
    "l1_loss",
    "mse_loss",
    "smooth_l1_loss",
    "kl_div",
    "binary_cross_entropy_with_logits",
    "margin_ranking_loss",
    "cross_entropy_loss",
    "cumprod",
    "cumsum",
    "dist",
    "prod",
    "softmax",
    "log_softmax",
    "sum",
    "logsumexp",
    "renorm",
]

pointer = ctypes.pythonapi.PyCapsule_GetPointer
pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class Backend(_DummyBackendModule):
    """What PyTorch, accelerate and transformers ask of torch.<device>."""

    class device:  # noqa: N801
        def __init__(self, index):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *raised):
            pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def nothing(self, *args, **kwargs):
        pass

    manual_seed = empty_cache = synchronize = set_device = nothing

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


def here(tensor: torch.Tensor) -> bool:
    return tensor.device.type == NAME


def moved(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    """The same memory as a tensor of the other device."""
    capsule = torch._C._to_dlpack(tensor.detach() if tensor.requires_grad else tensor)
    ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = kind
    return torch._C._from_dlpack(capsule)


def check(name: str, args: tuple, kwargs: dict) -> None:
    """Raise where CUDA does, for mixed devices. A CPU tensor of one number goes with any, but in a few operations."""
    flat = tree_flatten([args, kwargs])[0]
    if any(isinstance(value, torch.Generator) and value.device.type == "cpu" for value in flat):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' ({name})")
    if name in COPIES:
        return
    flat = tree_flatten([args[0], args[2:]])[0] if name in PUTS else flat
    tensors = [value for value in flat if isinstance(value, torch.Tensor)]
    places = {value.device for value in tensors if here(value) or value.dim() or name in STRICT}
    if any(map(here, tensors)) and len(places) > 1:
        shapes = [(value.device.type, tuple(value.shape)) for value in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device ({name}): {shapes}")


def kernel(op, *args, **kwargs):
    """Any operation of the device: the CPU's, on tensors of the same memory."""
    name = op._schema.name
    check(name, args, kwargs)
    if name in ("aten::_copy_from", "aten::_copy_from_and_resize"):
        source, target = (moved(value, CPU) if here(value) else value for value in args[:2])
        before = target.shape, target.data_ptr()
        if name.endswith("resize"):
            target.resize_(source.shape)
        target.copy_(source)
        if here(args[1]) and (target.shape, target.data_ptr()) != before:
            args[1].data = moved(target, EXTENSION)
        return args[1]
    if name == "aten::set_" and not isinstance(args[1], torch.Tensor):
        storage, *view = args[1:]
        memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        memory.owner = storage
        flat = torch.frombuffer(memory, dtype=args[0].dtype)
        offset, size, stride = view or (0, flat.shape, (1,))
        args[0].data = moved(flat.as_strided(size, stride, offset), EXTENSION)
        return args[0]
    flat, spec = tree_flatten([args, kwargs])
    taken, wraps = {}, False
    for place, value in enumerate(flat):
        if isinstance(value, torch.Tensor) and here(value):
            alias = moved(value, CPU)
            if not value.numel() or name == "aten::resize_":  # memory of another owner does not grow
                alias = alias.clone()
            taken[id(alias)] = alias, value, (alias.data_ptr(), alias.shape, alias.stride())
            flat[place], wraps = alias, True
        elif isinstance(value, torch.device) and value.type == NAME:
            flat[place], wraps = torch.device("cpu"), True
    args, kwargs = tree_unflatten(flat, spec)
    if kwargs.get("pin_memory"):
        raise RuntimeError("Only dense CPU tensors can be pinned")
    out = op(*args, **kwargs)
    for alias, value, before in taken.values():  # resized, or set to another tensor
        if (alias.data_ptr(), alias.shape, alias.stride()) != before:
            value.data = moved(alias, EXTENSION)

    def back(tensor):
        return taken[id(tensor)][1] if id(tensor) in taken else moved(tensor, EXTENSION)

    return tree_map_only(torch.Tensor, back, out) if wraps else out


def loaded(storage, location: str):
    """What torch.load makes of a storage that was on the device."""
    if not location.startswith(NAME):
        return None
    return moved(torch.empty(0, dtype=torch.uint8).set_(storage), EXTENSION).untyped_storage()


def casting(op, to: torch.dtype | None):
    """The operation under autocast: in `to`, or in autocast's dtype."""

    def cast(*args, **kwargs):
        dtype = to or torch.get_autocast_dtype(NAME)

        def change(x):
            return x.to(dtype) if x.is_floating_point() and here(x) and x.dtype != torch.float64 else x

        key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return op(*tree_map_only(torch.Tensor, change, args), **tree_map_only(torch.Tensor, change, kwargs))

    return cast


def register() -> list[library.Library]:
    """Make the device; it lasts as long as what is returned."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    torch.autograd.set_multithreading_enabled(False)  # its thread for such a device would not know this one's state
    kernels, autocast = library.Library("_", "IMPL"), library.Library("_", "IMPL")
    kernels.fallback(kernel, "PrivateUse1")
    autocast.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
    operations = library.Library("aten", "IMPL")
    for names, to in ((HALF, None), (FULL, torch.float32)):
        for packet in (getattr(torch.ops.aten, name) for name in names):
            for overload in packet.overloads():
                if "out" not in overload:
                    op = getattr(packet, overload)
                    operations.impl(op, casting(op, to), "AutocastPrivateUse1")
    torch.serialization.register_package(0, lambda storage: NAME if storage.device.type == NAME else None, loaded)

    def pin(tensor, device=None):
        if here(tensor):
            raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
        return tensor.clone()

    torch.Tensor.pin_memory = pin
    return [kernels, autocast, operations]


def pretend() -> None:
    """Let torch.cuda, accelerate, transformers and safetensors take the device for a Tesla T4."""
    import accelerate
    import accelerate.accelerator
    import peft.utils.save_and_load
    import safetensors.torch
    from transformers import TrainingArguments

    place, gib = torch.device(NAME, 0), 2**30
    facts = {
        "is_available": True,
        "is_bf16_supported": True,  # so it is said of a T4, too, which emulates it
        "get_device_capability": (7, 5),
        "get_device_name": "Tesla T4",
        "mem_get_info": (14 * gib, 15 * gib),
        "max_memory_allocated": gib,
        "memory_allocated": 0,
        "device_count": 1,
        "current_device": 0,
    }
    for name, value in facts.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    for name in (
        "set_device",
        "empty_cache",
        "synchronize",
        "manual_seed",
        "manual_seed_all",
        "reset_peak_memory_stats",
    ):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args: torch.get_rng_state()
        module.get_rng_state_all = lambda: [torch.get_rng_state()]
        module.set_rng_state = module.set_rng_state_all = lambda *args: None

    accelerate.PartialState.default_device = property(lambda self: place)
    accelerate.accelerator.get_grad_scaler = lambda kind=None, **settings: torch.amp.GradScaler(NAME, **settings)
    accelerate.accelerator.is_bf16_available = lambda *args: True
    setup = TrainingArguments.__dict__["_setup_devices"].func

    def set_up(self):
        found = setup(self)
        return place if found.type == "cuda" else found

    devices = cached_property(set_up)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    TrainingArguments._setup_devices = devices

    def of_cuda(to):
        def chosen(self, *args, **kwargs):
            cuda = [isinstance(arg, str | torch.device) and str(arg).startswith("cuda") for arg in args]
            return to(self, *(place if yes else arg for yes, arg in zip(cuda, args, strict=True)), **kwargs)

        return chosen

    torch.nn.Module.to, torch.Tensor.to = of_cuda(torch.nn.Module.to), of_cuda(torch.Tensor.to)
    load = safetensors.torch.load_file

    def load_file(filename, device="cpu", **settings):
        found = load(filename, **settings)
        return found if str(device) == "cpu" else {name: tensor.to(place) for name, tensor in found.items()}

    safetensors.torch.load_file = peft.utils.save_and_load.safe_load_file = load_file


if __name__ == "__main__":
    libraries = register()
    pretend()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
