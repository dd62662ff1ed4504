"""Models whose tensors have shapes and no storage, and how much memory a step with them would take, by role."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def without_storage(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """The module that `build` makes, from shapes alone: its parameters and buffers claim `device` and take no memory.

    It is built on the meta device, where casts and adapters work as usual; then each tensor becomes a fake one, since
    PyTorch chooses kernels (attention without a table of all pairs) by the device that a tensor claims. Operations on
    real tensors alone, such as token ids and masks, stay real.
    """
    mode, made = FakeTensorMode(allow_non_fake_inputs=True), {}

    def fake(tensor):
        if id(tensor) not in made:  # tied weights stay tied
            with mode:
                found = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                found = nn.Parameter(found, requires_grad=tensor.requires_grad)
            made[id(tensor)] = tensor, found  # holding the old one keeps its id from another
        return made[id(tensor)][1]

    with torch.device("meta"):
        model = build()
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: fake(tensor) for name, tensor in tensors.items() if tensor is not None}
    return model


def only_shapes() -> bool:
    """Whether `without_storage` is building a model: then no weights are read."""
    return torch.get_default_device().type == "meta"


class Footprint(TorchDispatchMode):
    """Bytes of all storages that are alive, by role, and what they were when their sum was largest.

    An operation's result counts as an activation, or as logits if its last dimension is the vocabulary, unless `label`
    says otherwise. Scratch memory inside kernels is not seen.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.alive, self.now, self.peak = vocabulary, {}, Counter(), Counter()

    def label(self, role: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count the storages of `tensors` as `role` from now on."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = storage._cdata, storage.nbytes()
            if key in self.alive:
                self.now[self.alive[key][1]] -= size
            self.alive[key] = weakref.ref(storage, lambda _, key=key: self._freed(key)), role, size
            self.now[role] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _freed(self, key: int) -> None:
        _, role, size = self.alive.pop(key)
        self.now[role] -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                of_vocabulary = tensor.ndim > 1 and tensor.shape[-1] == self.vocabulary
                self.label("logits" if of_vocabulary else "activations", [tensor])
        return found

    @contextmanager
    def phase(self):
        """Yields a Counter that holds, once it is left, the peak inside by role."""
        self.peak, found = self.now.copy(), Counter()
        with self:
            yield found
        found.update(self.peak)
