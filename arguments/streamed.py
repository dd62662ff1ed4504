"""A base model, its adapter and the merged model, with the weights on disk: each tensor is read when it is used."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    attach_align_device_hook,
    remove_hook_from_submodules,
)
from accelerate.utils import OffloadedWeightsLoader, set_module_tensor_to_device
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoConfig, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from arguments.adapter import saved_tensors, with_saved_adapter
from arguments.base import local_file, stored_tensors, weight_files
from arguments.command_line import Fault, UserError, first_line
from arguments.reward import HEADS

PREFIX = "base_model.model."  # of every name inside a PeftModel
WRAPPED = (".base_layer", ".original_module", ".token_adapter")  # what peft puts into the names of the base's tensors
# Half a step of a dtype, relative to the number that is rounded
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SLACK = 1e-5  # of the largest number: the order in which float32 sums are added


def opened(auto_class, name: str | Path, folder: Path, dtype: torch.dtype, **kwargs) -> tuple[nn.Module, dict]:
    """An empty model, and where each of its tensors is stored (accelerate's offload index).

    If the files name the tensors as the model does, no tensor is read. Else transformers' disk offload opens them: it
    reads each once and writes to `folder` what it must convert (experts of a mixture, .bin files). What the files
    lack, such as a new head, is not in the index.
    """
    grown = kwargs.pop("ignore_mismatched_sizes", False)
    config = AutoConfig.from_pretrained(name, **kwargs)
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=kwargs.get("trust_remote_code"))
    model.tie_weights()  # what init_empty_weights undid
    index = index_by_name(model, weight_files(str(name)), grown)
    if index is None:
        kwargs |= {"dtype": dtype, "ignore_mismatched_sizes": grown}
        model = auto_class.from_pretrained(name, device_map={"": "disk"}, offload_folder=str(folder), **kwargs)
        return without_hooks(model.eval())
    model._weight_conversions = []  # save_pretrained then keeps the names
    if model.can_generate() and local_file(str(name), GENERATION_CONFIG_NAME):
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.eval(), index


def index_by_name(model: nn.Module, files: list[Path], grown: bool) -> dict | None:
    """The offload index of an empty model, whose buffers are read; None if the files name its tensors differently.

    The files may lack tied weights and a new score head, and hold tensors of another size with `grown`: not in it.
    """
    if not all(path.suffix == ".safetensors" for path in files):
        return None
    stored = {name: (path, shape) for path in files for name, shape, _ in stored_tensors(path)}
    index = {}
    for name, tensor in model.state_dict().items():
        path, shape = stored.get(name, (None, None))
        if shape == tuple(tensor.shape):
            dtype = str(tensor.dtype).removeprefix("torch.")
            index[name] = {"safetensors_file": str(path), "weight_name": name, "dtype": dtype}
        elif not (grown if name in stored else name.partition(".")[0] in HEADS or name in model.all_tied_weights_keys):
            return None
    index = with_tied(model, index)
    weights = OffloadedWeightsLoader(index=index)
    for name, _ in model.named_buffers():
        if name in index:
            set_module_tensor_to_device(model, name, "cpu", value=weights[name])
    return index


def with_tied(model: nn.Module, index: dict) -> dict:
    """The index with the places of tied weights, and without what has none."""
    tied = {name: index.get(source) for name, source in model.all_tied_weights_keys.items() if name not in index}
    return {name: place for name, place in (index | tied).items() if place}


def running(model: nn.Module, index: dict) -> nn.Module:
    """An empty model made to run: each module reads its weights just before it is used."""
    weights = OffloadedWeightsLoader(index=index)
    attach_align_device_hook(model, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
    return with_embeddings_on_cpu(model)


def with_embeddings_on_cpu(model: nn.Module) -> nn.Module:
    """The model with placeholders of no size for its embeddings, before and after they are used.

    Llama 4 sends the ids to where its embedding is, Gemma 4 looks at a row. Numbers that count for the result are NaN.
    """

    def put(part, *_):
        part.weight = nn.Parameter(torch.tensor([torch.nan]).expand(part.weight.shape), requires_grad=False)

    for part in model.modules():
        if isinstance(part, nn.Embedding):
            put(part)
            if "_hf_hook" in vars(part):  # else a layer around it reads its weights, and drops them
                part.register_forward_hook(put)
    return model


def without_hooks(model: nn.Module) -> tuple[nn.Module, dict]:
    """A model of transformers' disk offload as an empty one, and the index of where its tensors lie."""
    hooks = [hook for module in model.modules() if (hook := getattr(module, "_hf_hook", None)) and hook.offload]
    index = with_tied(model, dict(hooks[0].weights_map.dataset.index))
    for hook in hooks:
        hook.original_devices = {}  # else removing it would restore a new head from the map, which lacks it
    remove_hook_from_submodules(model)
    del model.hf_device_map  # else peft dispatches it again
    return model, index


def adapter_shapes(adapter: Path) -> dict[str, torch.Size]:
    """Shapes of the adapter's tensors, by the names that their counterparts have in the base model."""
    return {plain(name): tensor.shape for name, tensor in saved_tensors(adapter).items()}


def grown_vocabulary(model: nn.Module, adapter: Path) -> int | None:
    """Rows of the input embedding saved with the adapter, if the base has another number of them; else None."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding) + ".weight"
    rows = adapter_shapes(adapter).get(name, embedding.weight.shape)[0]
    return rows if rows != embedding.weight.shape[0] else None


def plain(name: str) -> str:
    """The name in the base model of a tensor in a PeftModel."""
    for part in WRAPPED:
        name = name.replace(part, "")
    return name.removeprefix(PREFIX)


def wrappers(model: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Name in the base model and module of each outermost layer that peft wrapped."""
    last = None
    for name, module in model.named_modules():
        inside = last is not None and name.startswith(last)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
            last = name + "."
            yield name.removeprefix(PREFIX), module


def layers(wrapper: nn.Module) -> Iterator[LoraLayer]:
    """The LoRA layers around one layer of the base: one, or one around the other for the matrices of some experts."""
    while isinstance(wrapper, LoraLayer):
        yield wrapper
        wrapper = wrapper.base_layer


def adapted(model: nn.Module, index: dict, adapter: Path) -> tuple[PeftModel, Mapping]:
    """An empty model with the adapter around it, and the map that reads its tensors, the adapter's too.

    It can run: each module reads its weights just before it is used. A layer with an adapter reads all of its own at
    once, since it may use its base's weight without calling it (DoRA).

    Raises:
        RuntimeError, ValueError: when the adapter does not fit the model, or neither holds some tensor.
    """
    given = adapter_shapes(adapter)
    nothing = torch.zeros(1)  # stands for the base's weights: if they were on meta, peft would lose the adapter's
    for name, tensor in list(model.named_parameters(remove_duplicate=False)):
        if name in index and name not in given:
            value = nothing.expand(tensor.shape)
        else:
            value = torch.full(tensor.shape, torch.nan)
        set_module_tensor_to_device(model, name, "cpu", value=value)
    model = with_saved_adapter(model, adapter, "default", trainable=False).eval()
    tensors = {name: tensor.data for name, tensor in model.named_parameters(remove_duplicate=False)}
    own = {name: tensor for name, tensor in tensors.items() if tensor.data_ptr() != nothing.data_ptr()}
    for name, tensor in list(own.items()):
        if plain(name) in index and tensor.isnan().all():
            del own[name]
        elif plain(name) in index and plain(name) not in given and ".modules_to_save" not in name:
            raise ValueError(f"its kind of initialisation changes the base ({plain(name)}): save it as plain LoRA")
        elif ".original_module" not in name and tensor.isnan().any():
            raise ValueError(f"{plain(name)} holds NaN in the adapter, or is in neither of the two")
    places = {name: index[plain(name)] for name in tensors if name not in own}
    weights = OffloadedWeightsLoader(state_dict=own, index=places)
    attach_align_device_hook(
        model,
        execution_device=torch.device("cpu"),
        offload=True,
        weights_map=weights,
        preload_module_classes=sorted({type(module).__name__ for _, module in wrappers(model)}),
    )
    return with_embeddings_on_cpu(model), weights


def by_formula(layer: LoraLayer, weight: torch.Tensor) -> torch.Tensor:
    """`weight` after LoRA: W + s B A, with rows scaled to the trained lengths under DoRA; all in float32.

    https://arxiv.org/abs/2106.09685 (LoRA, eq. 3) and https://arxiv.org/abs/2402.09353 (DoRA, eq. 5).
    """
    (name,) = layer.active_adapters
    embedding = name in layer.lora_embedding_A
    a = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
    b = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
    if weight.ndim == 3:  # the experts of a mixture, with a B and an A each: [experts, out, in], or [experts, in, out]
        b, a = b.unflatten(1, (-1, len(weight))).permute(2, 0, 1), a.unflatten(0, (len(weight), -1))
        turned = layer.in_features != weight.shape[2]
    else:
        turned = embedding or layer.fan_in_fan_out  # stored as [in, out], and B A is [out, in]
    result = (b @ a).mul_(layer.scaling[name]).add_(weight.mT if turned else weight)
    if name in layer.lora_magnitude_vector:
        lengths = layer.lora_magnitude_vector[name].weight.flatten()
        result.mul_((lengths / result.norm(dim=1)).unsqueeze(1))
    return result.mT if turned else result


class MergedWeights(Mapping):
    """Name of a tensor in the merged model -> that tensor, merged on demand and checked against the formula.

    Attributes:
        errors: of each merged matrix, the largest difference from `by_formula`, relative to its largest number.

    Raises:
        Fault: when a merged matrix is not finite, or differs from the formula by more than rounding explains.
    """

    def __init__(self, model: PeftModel, weights: Mapping, dtype: torch.dtype):
        self.weights, self.dtype, self.errors = weights, dtype, {}
        self.names = [plain(name) for name, _ in model.named_parameters()]
        self.wrapped = dict(wrappers(model))
        self.last = None, {}

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        owner = next((owner for owner in self.wrapped if name.startswith(owner + ".")), None)
        if owner is None:
            return self.weights[PREFIX + name].to(self.dtype)
        if owner != self.last[0]:
            self.last = owner, self.merged(owner)
        return self.last[1][name.removeprefix(owner + ".")]

    def merged(self, owner: str) -> dict[str, torch.Tensor]:
        """The tensors of one wrapped layer, by their names in the base's layer."""
        wrapper = self.wrapped[owner]
        wrapper._hf_hook.pre_forward(wrapper)  # reads its weights
        expected = {}
        if isinstance(wrapper, AuxiliaryTrainingWrapper):
            result = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            result = wrapper.get_base_layer()
        for layer in layers(wrapper):
            parameter = getattr(layer, "parameter_name", "weight")
            weight = getattr(result, parameter)
            expected[parameter] = by_formula(layer, weight)
            weight.data = weight.data.clone()  # peft merges in place, and the adapter's own weights are read again
            try:
                layer.merge()
            except RuntimeError as error:
                raise UserError(f"peft cannot merge this kind of adapter into {owner}: {first_line(error)}") from error
        tensors = {name: tensor.to(self.dtype, copy=True) for name, tensor in result.state_dict().items()}
        for parameter, tensor in expected.items():
            self.prove(f"{owner}.{parameter}", tensor, tensors[parameter])
        for layer in layers(wrapper):
            layer.merged_adapters.clear()
        wrapper._hf_hook.post_forward(wrapper, None)  # drops them
        return tensors

    def prove(self, name: str, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Check a merged matrix against what it should be, number by number; overwrites `expected`."""
        difference = found.to(torch.float32, copy=True).sub_(expected).abs_()
        largest = expected.abs_().max()
        self.errors[name] = (difference.max() / largest.clamp(min=1e-30)).item()
        allowed = expected.mul_(ROUNDING[self.dtype]).add_(SLACK * largest)
        if not (difference <= allowed).all():  # also refuses NaN
            raise Fault(
                f"{name} is off by up to {self.errors[name]:.2g} of its largest number after the merge into "
                f"{self.dtype}, nothing was kept"
            )


def untie(model: nn.Module, merged: MergedWeights) -> list[str]:
    """Give tied weights that the merge made unequal a tensor each; returns the names of the new ones."""
    apart = [
        name for name, source in model.all_tied_weights_keys.items() if not torch.equal(merged[name], merged[source])
    ]
    for name in apart:
        module, _, parameter = name.rpartition(".")
        tensor = model.get_parameter(name)
        setattr(model.get_submodule(module), parameter, nn.Parameter(torch.empty_like(tensor), requires_grad=False))
        del model.all_tied_weights_keys[name]
    if apart:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return apart


def save_merged(model: nn.Module, merged: MergedWeights, folder: Path, max_shard_size: int | str) -> None:
    """save_pretrained of an empty model, in the dtype to write, with `merged` as its tensors, file by file."""
    for name, tensor in model.named_parameters():
        if tensor.device.type != "meta":  # not of the base: a new head, the rows of a grown vocabulary
            set_module_tensor_to_device(model, name, "meta")
    add_hook_to_module(model, AlignDevicesHook(torch.device("cpu"), offload=True, weights_map=merged))
    model.hf_device_map = {"": "disk"}  # save_pretrained then asks the hook for each tensor
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")  # one file is held
        model.save_pretrained(folder, max_shard_size=max_shard_size)
