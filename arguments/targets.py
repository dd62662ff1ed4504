"""Which layers a LoRA is on: those that its flags name, also where peft takes them for the experts of a mixture."""

import re

import torch
from loguru import logger
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

ALL = "all-linear"  # peft's word for every linear layer but the head


def is_linear(layer: nn.Linear) -> bool:
    """Whether a layer computes as nn.Linear does, so that LoRA's output can be added to its own.

    Some routers derive from nn.Linear and return a tuple. A forward of its own alone says nothing: Falcon's layers
    have one, and quantised layers, which are let through by the kind or the size of their numbers.
    """
    quantised = type(layer.weight) is not nn.Parameter or layer.weight.dtype.itemsize == 1
    if type(layer).forward is nn.Linear.forward or quantised:
        return True
    shapes = {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    empty = {name: torch.empty(shapes[name], device="meta") for name, _ in layer.named_parameters(recurse=False)}
    try:
        result = functional_call(layer, empty, torch.empty(1, layer.in_features, device="meta"))
    except RuntimeError:  # it takes inputs of another shape
        return False
    return torch.is_tensor(result)


def suffix(name: str) -> str:
    """The last two parts of a module's name: the same in every layer of the model, as self_attn.q_proj."""
    return ".".join(name.split(".")[-2:])


def complete(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """`config` such that peft puts LoRA on all linear layers of `model` that it names, now and when it is read again.

    In many mixtures of experts peft takes gate_proj, up_proj and down_proj for the experts' joint weights alone, and
    leaves out the layers so called in dense blocks and shared experts. They are then targeted by their weights.
    """
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    config.exclude_modules = sorted({suffix(name) for name, part in linear.items() if not is_linear(part)}) or None
    trunk = {id(part) for part in model.base_model.modules()} - {id(model.get_output_embeddings())}
    plain = [name for name, part in linear.items() if type(part) is nn.Linear and id(part) in trunk]
    asked = [name for name in plain if config.target_modules == ALL or check_target_module_exists(config, name)]
    convert_peft_config_for_transformers(config, model, None)
    if config.target_modules != ALL:
        lost = {f"{suffix(name)}.weight" for name in asked if not check_target_module_exists(config, name)}
        config.target_parameters = {*(config.target_parameters or ()), *lost} or None
    return config


def warn_of_frozen(model: PeftModel) -> None:
    """Name what was not asked to be left out but is: linear layers and the joint weights of experts without a LoRA."""
    adapters = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    adapted = {(id(layer.get_base_layer()), getattr(layer, "parameter_name", "weight")) for layer in adapters}
    base, left = model.get_base_model(), set()
    for module, part in base.base_model.named_modules():
        for name, weight in part.named_parameters(recurse=False) if part is not base.get_output_embeddings() else ():
            linear = isinstance(part, nn.Linear) and name == "weight" and "original_module" not in module
            joint = (
                weight.ndim == 3
                and weight.shape[0] > 1
                and "original_module" not in module
                and not isinstance(part, nn.modules.conv._ConvNd)
            )
            if (linear or joint) and not weight.requires_grad and (id(part), name) not in adapted:
                left.add(re.sub(r"\.\d+\.", ".*.", f"{module}.{name}" if joint else module))
    if left:
        logger.warning(f"No LoRA for {', '.join(sorted(left))}: they stay as they are. --use_peft False trains them")
