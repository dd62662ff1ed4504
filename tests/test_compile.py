"""--torch_compile: a few graphs for all layers and rows of any length, which learn what the layers learn without."""

import copy
import os
import shutil

import pytest
import torch
from conftest import ADAPTER, history, in_process, stage
from peft import TaskType
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arguments.adapter import AdapterArguments
from arguments.attention import blockwise_attention
from arguments.command_line import UserError
from supervised_finetuning import FinetuningArguments


def settings(tmp_path, **fields) -> FinetuningArguments:
    return FinetuningArguments(output_dir=str(tmp_path), report_to="none", **fields)


def adapted(folder: str, **flags):
    return AdapterArguments(**flags).apply(AutoModelForCausalLM.from_pretrained(folder), TaskType.CAUSAL_LM).train()


@pytest.mark.parametrize(
    ("fields", "environment", "expected"),
    [
        ({}, "no", None),
        ({"torch_compile_backend": "NO"}, "no", None),
        ({"torch_compile": True}, "no", {"backend": "inductor"}),
        ({"torch_compile_mode": "max-autotune"}, "no", {"backend": "inductor", "mode": "max-autotune"}),
        ({"torch_compile_backend": "EAGER"}, "no", {"backend": "eager"}),
        ({}, "EAGER", {"backend": "eager"}),
    ],
)
def test_layers_are_compiled_and_nothing_else(fields, environment, expected, tiny, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append((type(self).__name__, how)))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", environment)
    args, model = settings(tmp_path, **fields), adapted(tiny("llama"))
    args.compile_layers(model)
    how = {"dynamic": True, "recompile_limit": 64, "mode": None} | (expected or {})
    assert compiled == ([("LlamaDecoderLayer", how)] * model.config.num_hidden_layers if expected else [])
    assert not args.torch_compile and "ACCELERATE_DYNAMO_BACKEND" not in os.environ, "accelerate would compile more"


@pytest.mark.parametrize("fields", [{"torch_compile_backend": "fast"}, {"torch_compile_mode": "fast"}])
def test_an_unknown_way_to_compile_is_refused(fields, tmp_path):
    with pytest.raises(UserError, match="fast is unknown: expected one of"):
        settings(tmp_path, **fields)


def test_without_a_compiler_it_is_said_before_anything_is_loaded(tmp_path):
    none = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})  # a monkeypatch would leave it hidden
    with none, pytest.raises(UserError, match="needs a C\\+\\+ compiler: apt install"):
        settings(tmp_path, torch_compile=True)


@pytest.mark.parametrize(("family", "dropout"), [("llama", 0.0), ("llama", 0.1), ("gemma3", 0.0)])
def test_few_graphs_serve_all_layers_and_lengths(family, dropout, tiny, tmp_path, monkeypatch):
    """Four: of a layer whose input has a gradient or, as the first one, has none, with a mask and without.

    The graphs call the operator that attends in blocks, and gradients are those of plain layers to bf16's rounding.
    """
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", blockwise_attention)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    plain, args = adapted(tiny(family), lora_dropout=dropout), settings(tmp_path)
    model, args.compile_settings = copy.deepcopy(plain), {"backend": counter}
    args.compile_layers(model)

    def gradient(model, ids, mask):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, attention_mask=mask, use_cache=False).logits.float()
        logits.log_softmax(-1)[:, 3:, 7].sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    for length in (20, 70, 33):
        ids = torch.randint(10, 300, (2, length), generator=torch.Generator().manual_seed(length))
        for seen in (length, length - 5):
            mask = (torch.arange(length) < torch.tensor([[length], [seen]])).long()
            found, expected = gradient(model, ids, mask), gradient(plain, ids, mask)
            assert dropout or (found - expected).norm() < 0.02 * expected.norm()
    graphs = [graph.print_readable(print_output=False) for graph in counter.graphs if len(graph.graph.nodes)]
    assert len(graphs) == 4 and all("blockwise.attend" in graph for graph in graphs)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_it_learns_as_without(tiny, records, tmp_path):
    """Of pairs in one row, with a mask and positions of their own. (In bf16 rounding differs: 0.007 after 3 steps.)"""
    for flags in ((), ("--torch_compile",)):
        output = tmp_path / str(len(flags))
        flags += ("--precision", "fp32", "--do_eval", "False")
        assert "in one row" in in_process(*stage("rm", tiny("llama"), records, output, *flags)).ok().stderr
    plain, compiled = tmp_path / "0", tmp_path / "1"
    assert history(compiled, "loss") == pytest.approx(history(plain, "loss"), abs=1e-4)
    found, expected = load_file(compiled / ADAPTER), load_file(plain / ADAPTER)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["pt", "sft", "rm"])
def test_each_stage_compiles(name, tiny, records, tmp_path, monkeypatch):
    """With activation checkpointing, too."""
    seen, compile_layers = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *a, **how: seen.append(how) or compile_layers(*a, **how))
    flags = ("--torch_compile_backend", "eager", "--activation_checkpointing", "--precision", "fp32")
    for output, more in (("plain", flags[2:]), ("compiled", flags)):
        in_process(*stage(name, tiny("llama"), records, tmp_path / output, *more)).ok()
    assert seen and history(tmp_path / "compiled", "loss") == pytest.approx(
        history(tmp_path / "plain", "loss"), abs=1e-4
    )
