"""--torch_compile: layers are compiled once for rows of any length, and learn what they learn without."""

import shutil

import pytest
import torch
from conftest import ADAPTER, history, in_process, stage
from peft import TaskType
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arguments import AdapterArguments
from supervised_finetuning import FinetuningArguments


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"torch_compile": True}, {"dynamic": True}),
        ({"torch_compile_mode": "max-autotune"}, {"dynamic": True, "mode": "max-autotune"}),
        ({"torch_compile_backend": "eager"}, {"dynamic": True, "backend": "eager"}),
    ],
)
def test_layers_are_compiled_and_nothing_else(fields, expected, tiny, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append((type(self).__name__, how)))
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model = AdapterArguments().apply(model, TaskType.CAUSAL_LM)
    args = FinetuningArguments(output_dir=str(tmp_path), report_to="none", **fields)
    args.compile_layers(model)
    assert compiled == ([("LlamaDecoderLayer", expected)] * model.config.num_hidden_layers if expected else [])
    assert not args.torch_compile, "accelerate would compile the rest"


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
    assert load_file(compiled / ADAPTER).keys() == load_file(plain / ADAPTER).keys()
