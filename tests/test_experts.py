"""Mixtures of experts: files name the experts otherwise than memory does, and peft takes other layers for them."""

import json
import shutil

import pytest
import torch
from conftest import ADAPTER, in_process, merge, stage
from peft import TaskType
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig

from arguments.adapter import AdapterArguments
from arguments.targets import is_linear

TWO_STEPS = {
    "pt": ("--max_steps", 2, "--save_steps", 1),
    "rm": ("--max_steps", 2, "--save_steps", 1),
    "rl": ("--max_steps", 2, "--save_steps", 1, "--reward_functions", f"{__file__}:shorter", "--critic", "head"),
}


def shorter(completion_ids, **columns):
    return [ids[0] % 7 - len(ids) for ids in completion_ids]


def assert_same(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("name", TWO_STEPS)
def test_all_weights_of_a_mixture_go_on(name, tiny, records, tmp_path):
    flags = ("--use_peft", "False", *TWO_STEPS[name])
    in_process(*stage(name, tiny("mixtral"), records, tmp_path / "whole", *flags)).ok()
    first = min((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    shutil.copytree(first, tmp_path / "cut" / first.name)
    said = in_process(*stage(name, tiny("mixtral"), records, tmp_path / "cut", *flags)).ok().stderr
    assert "Going on from" in said
    assert_same(tmp_path / "whole" / "model.safetensors", tmp_path / "cut" / "model.safetensors")


def test_the_best_weights_of_a_mixture_are_its_last(tiny, records, tmp_path):
    """With --greater_is_better the highest loss is the best: that of the first checkpoint."""
    often = ("--max_steps", 2, "--save_steps", 1, "--eval_steps", 1, "--eval_strategy", "steps")
    best = ("--load_best_model_at_end", "--metric_for_best_model", "loss", "--greater_is_better", "True")
    in_process(*stage("sft", tiny("mixtral"), records, tmp_path, "--use_peft", "False", *often, *best)).ok()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-1")
    assert_same(tmp_path / "model.safetensors", tmp_path / "checkpoint-1" / "model.safetensors")


@pytest.mark.parametrize("targets", ["all", "q_a_proj,gate_proj,up_proj,down_proj"])
def test_layers_that_are_called_as_experts_get_a_lora(targets, tiny, records, tmp_path):
    base, out = tiny("deepseek"), tmp_path / "pt"
    in_process(*stage("pt", base, records, out, "--target_modules", targets)).ok()
    names = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in load_file(out / ADAPTER)}
    parts = AutoModelForCausalLM.from_pretrained(base).model.named_modules(prefix="model")
    linear = [name for name, part in parts if isinstance(part, nn.Linear)]
    asked = {name for name in linear if targets == "all" or name.rpartition(".")[2] in targets.split(",")}
    assert {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.shared_experts.up_proj"} <= asked <= names
    in_process(*merge(base, out, tmp_path / "merged")).ok()
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (base, tmp_path / "merged"))
    assert [name for name in asked if torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])] == []
    shutil.copytree(out / "checkpoint-3", tmp_path / "again" / "checkpoint-3")
    in_process(*stage("pt", base, records, tmp_path / "again", "--target_modules", targets)).ok()
    assert_same(out / ADAPTER, tmp_path / "again" / ADAPTER)


def test_ppo_puts_both_adapters_on_the_same_layers(tiny, records, tmp_path):
    flags = ("--reward_functions", f"{__file__}:shorter", "--critic", "adapter")
    in_process(*stage("rl", tiny("deepseek"), records, tmp_path, *flags)).ok()
    policy, critic = load_file(tmp_path / ADAPTER), load_file(tmp_path / "value" / "model.safetensors")
    assert policy.keys() == critic.keys()


@pytest.mark.parametrize("name", ["pt", "sft"])
def test_a_router_that_returns_a_tuple_gets_no_lora(name, tiny, records, tmp_path):
    base, out = tiny("llama4"), tmp_path / "out"
    said = in_process(*stage(name, base, records, out)).ok().stderr
    (line,) = [line for line in said.splitlines() if "No LoRA for" in line]
    experts = "model.layers.*.feed_forward.experts"
    assert f"for {experts}.down_proj, {experts}.gate_up_proj, model.layers.*.feed_forward.router: they stay" in line
    in_process(*merge(base, out, tmp_path / "merged")).ok()


@pytest.mark.parametrize(("targets", "lines"), [("all", 1), ("q_proj,v_proj", 0)])
def test_experts_without_a_lora_are_named(targets, lines, tiny, logged):
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt_oss"))
    AdapterArguments(target_modules=targets).apply(model, TaskType.CAUSAL_LM)
    said = [line for line in logged if "No LoRA for layers.*.mlp.experts.down_proj, layers.*.mlp.experts" in line]
    assert len(said) == lines


def test_a_forward_of_its_own_is_no_reason_to_leave_a_layer_out(logged):
    size = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(FalconConfig(**size))
    model = AdapterArguments().apply(model, TaskType.CAUSAL_LM)
    assert len(model.targeted_module_names) == 4 and not any("No LoRA" in line for line in logged)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_quantised_layers_are_linear(dtype):
    class Quantised(nn.Linear):
        def forward(self, x):
            raise AssertionError("it is not called")

    layer = Quantised(4, 4)
    layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    assert is_linear(layer)
