"""The merge: every kind of adapter, base and dtype against peft's adapter model; and what a failed one leaves."""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, in_process, merge, stage
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma4Config,
    JetMoeConfig,
    LlamaConfig,
    MixtralConfig,
)

import merge_peft_adapter
from arguments.base import facts_of, fingerprint, record_base
from arguments.command_line import Fault
from arguments.reward import is_own
from arguments.streamed import opened
from merge_peft_adapter import compare, exchange

sys.path.append(str(ROOT / "benchmarks"))
from measure import measure

IDS = torch.arange(3, 40).unsqueeze(0)
ALL = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False}
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "bloom": "word_embeddings", "gemma3": "embed_tokens"}


def save_adapter(base: str, folder: Path, auto_class=AutoModelForCausalLM, rows: int | None = None, **config) -> Path:
    """A random adapter on `base`, far enough from nothing; its base grown to `rows` token ids first."""
    torch.manual_seed(1)
    head = {"num_labels": 1} if auto_class is AutoModelForSequenceClassification else {}
    model = auto_class.from_pretrained(base, dtype=torch.float32, **head)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    model = get_peft_model(model, LoraConfig(**(ALL | config)))
    for name, tensor in model.named_parameters():
        if tensor.requires_grad and "lora_magnitude" not in name:
            tensor.data += 0.05 * torch.randn_like(tensor)
        elif tensor.requires_grad:
            tensor.data *= 1 + 0.1 * torch.rand_like(tensor)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@torch.no_grad()
def in_memory(base: str, adapter: Path, rows: int | None = None):
    """Logits of the base, and of peft's adapter model, both held whole in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    before = model(IDS).logits
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return before, PeftModel.from_pretrained(model, adapter).eval()(IDS).logits


@torch.no_grad()
def assert_merged(base: str, adapter: Path, output: Path, atol: float = 1e-4, rows: int | None = None) -> dict:
    before, expected = in_memory(base, adapter, rows)
    merged, loading = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    found = merged.eval()(IDS).logits
    assert (expected[..., : before.shape[-1]] - before).abs().max() > 10 * atol, "the adapter changes nothing"
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)
    return json.loads((output / "merge.json").read_text())


def killed(command: list, monkeypatch) -> bool:
    """Whether a merge in a child of this process was killed, as what the test has patched makes it."""
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(sys, "argv", list(map(str, command)))
            merge_peft_adapter.main()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["embedding", "q_proj", "c_attn", "query_key_value"]},
    "dora on embeddings": {"use_dora": True, "target_modules": ["embedding"]},
    "head": {"target_modules": ["lm_head"]},
    "head and attention": {"target_modules": ["q_proj", "c_attn", "query_key_value", "lm_head"]},
    "embeddings in full": {"target_modules": ["mlp"], "modules_to_save": ["embedding"]},
    "both in full": {"modules_to_save": ["embedding", "lm_head"]},
    "some tokens": {"trainable_token_indices": [5, 6, 7]},
    "biases": {"bias": "lora_only"},
    "ranks by layer": {"rank_pattern": {"layers.0": 2}, "alpha_pattern": {"layers.1": 3}},
}
UNTIES = ("head and attention", "embeddings", "dora on embeddings", "head", "embeddings in full", "both in full")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "bloom"])
def test_every_kind_of_adapter(family, kind, tiny, tmp_path):
    """The llama here has a tensor each for embedding and head, the others share one; gpt2 is made of Conv1D."""
    base, config = tiny(family), dict(KINDS[kind])
    mlp = {"gpt2": "c_fc", "bloom": "dense_h_to_4h"}.get(family, "up_proj")
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = [{"embedding": EMBEDDING[family], "mlp": mlp}.get(name, name) for name in config[key]]
    present = {name.rpartition(".")[2] for name, _ in AutoModelForCausalLM.from_pretrained(base).named_modules()}
    if isinstance(config.get("target_modules"), list):
        config["target_modules"] = [name for name in config["target_modules"] if name in present]
    adapter = save_adapter(base, tmp_path / "adapter", fan_in_fan_out=family == "gpt2", **config)
    in_process(*merge(base, adapter, tmp_path / "merged")).ok()
    facts = assert_merged(base, adapter, tmp_path / "merged")
    assert bool(facts["untied"]) == (family != "llama" and kind in UNTIES)
    assert facts["tensors"]["largest_error"] < 1e-5 and facts["parity"]["equal_top1"] == 1.0


def largest(files) -> int:
    return max(file.stat().st_size for file in files)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_and_files(dtype, tiny, tmp_path):
    """A base in several files stays in files of that size; the written dtype is the one asked for."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(base, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(base)
    adapter = save_adapter(str(base), tmp_path / "adapter", lora_alpha=1)
    in_process(*merge(base, adapter, tmp_path / "merged"), "--dtype", dtype).ok()
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {getattr(torch, dtype)}
    assert max(file.stat().st_size for file in files) <= max(
        file.stat().st_size for file in base.glob("*.safetensors")
    )
    assert len(files) > 1
    assert_merged(str(base), adapter, tmp_path / "merged", atol={"float32": 1e-4, "float16": 2e-3}.get(dtype, 2e-2))
    in_process(*merge(base, adapter, tmp_path / "one"), "--max_shard_size", "1GB").ok()
    assert [file.name for file in (tmp_path / "one").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3", "mistral", "glm4", "neox"])
def test_the_files_are_found_as_transformers_finds_them(family, tiny, tmp_path, monkeypatch):
    """Without a tensor being read, each is located where transformers' own disk offload locates it."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny(family)).save_pretrained(base, max_shard_size="60KB")
    model, index = opened(AutoModelForCausalLM, base, tmp_path / "scratch", torch.float32)
    monkeypatch.setattr("arguments.streamed.index_by_name", lambda *_: None)
    theirs, expected = opened(AutoModelForCausalLM, base, tmp_path / "scratch", torch.float32)
    assert index == expected and not list((tmp_path / "scratch").iterdir())
    assert all(tensor.device.type == "meta" for tensor in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), theirs.buffers(), strict=True))


def test_a_model_in_many_files_is_not_held_whole(tiny, tmp_path):
    """420 MB in files of 60 MB, under the malloc settings that the run scripts export."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "large", max_shard_size="60MB")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "large")
    settings = os.environ | {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    peaks = []
    for base in (tiny("llama"), tmp_path / "large"):
        adapter = save_adapter(str(base), tmp_path / "adapter", lora_alpha=1)
        command = [sys.executable, *merge(base, adapter, tmp_path / "merged")]
        peaks.append(measure(command, settings)[1])
    assert peaks[1] - peaks[0] < 0.2, peaks


@pytest.mark.parametrize("legacy", [False, True])
def test_old_files(legacy, tiny, tmp_path):
    """A base of pytorch_model.bin, as bloom-560m's first release; or of torch before 1.6, whose files are no zip."""
    base = shutil.copytree(tiny("bloom"), tmp_path / "base")
    torch.save(
        load_file(base / "model.safetensors"), base / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy
    )
    (base / "model.safetensors").unlink()
    adapter = save_adapter(str(base), tmp_path / "adapter")
    in_process(*merge(base, adapter, tmp_path / "merged")).ok()
    assert_merged(str(base), adapter, tmp_path / "merged")
    assert not (tmp_path / "merged/.merging").exists() and not (tmp_path / "merged/converted").exists()
    (base / "pytorch_model.bin").write_bytes((base / "pytorch_model.bin").read_bytes()[:999])
    ended = in_process(*merge(base, adapter, tmp_path / "again"))
    assert ended.code == 2 and "pytorch_model.bin" in ended.errors[0] and not (tmp_path / "again").exists()


def test_a_mixture_of_experts_keeps_its_file_names(tiny, tmp_path):
    """transformers joins the experts of a layer when it loads them; the merged files have them apart again."""
    words = AutoTokenizer.from_pretrained(tiny("llama"))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=len(words), num_key_value_heads=2, num_local_experts=4, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    adapter = save_adapter(str(tmp_path / "base"), tmp_path / "adapter")
    in_process(*merge(tmp_path / "base", adapter, tmp_path / "merged")).ok()
    assert_merged(str(tmp_path / "base"), adapter, tmp_path / "merged")
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("base", "merged")]
    assert names[0] == names[1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_grown_vocabulary(family, tiny, tmp_path):
    base, rows = tiny(family), 410
    full = {"modules_to_save": [EMBEDDING[family], "lm_head"]} if family == "llama" else {}
    adapter = save_adapter(base, tmp_path / "adapter", rows=rows, fan_in_fan_out=family == "gpt2", **full)
    in_process(*merge(base, adapter, tmp_path / "merged")).ok()
    assert_merged(base, adapter, tmp_path / "merged", rows=rows)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == rows


def test_adapters_of_adapters(tiny, tmp_path):
    """Each adapter is merged into what the one before it became."""
    base = tiny("llama")
    for number in range(3):
        adapter = save_adapter(base, tmp_path / f"adapter-{number}")
        in_process(*merge(base, adapter, tmp_path / f"merged-{number}")).ok()
        assert_merged(base, adapter, tmp_path / f"merged-{number}")
        base = str(tmp_path / f"merged-{number}")


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-4), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_a_reward_model_keeps_its_head(dtype, atol, tiny, tmp_path):
    base, sequence = tiny("llama"), AutoModelForSequenceClassification
    adapter = save_adapter(base, tmp_path / "adapter", sequence, task_type="SEQ_CLS", lora_alpha=1)
    in_process(*merge(base, adapter, tmp_path / "merged"), "--dtype", dtype).ok()
    facts = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert facts["dtype"] == dtype and "equal_top1" not in facts["parity"]
    plain = sequence.from_pretrained(base, num_labels=1, pad_token_id=0, dtype=torch.float32)
    found = sequence.from_pretrained(tmp_path / "merged", pad_token_id=0, dtype=torch.float32)
    assert found.config.problem_type == "regression"
    with torch.no_grad():
        expected = PeftModel.from_pretrained(plain, adapter).eval()(IDS).logits
        torch.testing.assert_close(found.eval()(IDS).logits, expected, atol=atol, rtol=1e-4)


def test_a_reward_adapter_without_a_tokenizer_on_a_base_without_a_pad_token(tiny, tmp_path):
    """As peft alone saves it: the base's tokenizer is taken, and what it pads with is chosen as in training."""
    base, sequence = tiny("mistral"), AutoModelForSequenceClassification
    assert AutoConfig.from_pretrained(base).pad_token_id is AutoTokenizer.from_pretrained(base).pad_token_id is None
    adapter = save_adapter(base, tmp_path / "adapter", sequence, task_type="SEQ_CLS")
    for file in adapter.glob("token*"):
        file.unlink()
    by_other_names = ("--base_model", base, "--lora_model", adapter, "--output_dir", tmp_path / "merged")
    in_process("merge_peft_adapter.py", *by_other_names).ok()
    config, tokenizer = (kind.from_pretrained(tmp_path / "merged") for kind in (AutoConfig, AutoTokenizer))
    assert tokenizer.pad_token == "<unk>" and config.pad_token_id == tokenizer.pad_token_id


def test_scores_that_lie_close_together_are_held_against_their_size():
    one = [torch.tensor([value]) for value in (3.0, 3.001, 2.999)]
    found = compare(one, [score + 0.003 for score in one])
    assert found.keys() == {"largest_difference", "relative_difference"}
    assert found["relative_difference"] == pytest.approx(0.001, rel=0.01)
    assert compare(one, [-score for score in one])["relative_difference"] == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_a_model_of_other_logits_is_not_kept(difference, tiny, tmp_path, monkeypatch):
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    parity = {"largest_difference": 9.0, "relative_difference": difference, "equal_top1": 0.5}
    monkeypatch.setattr(merge_peft_adapter, "compare", lambda *_: parity)
    monkeypatch.setattr(sys, "argv", list(map(str, merge(tiny("llama"), adapter, tmp_path / "merged"))))
    with pytest.raises(Fault, match="differs from the adapter model, nothing was kept: .*9.0"):
        merge_peft_adapter.main()
    assert not (tmp_path / "merged").exists()


def test_merge_json_says_what_was_merged_and_how_well(tiny, tmp_path):
    base = tiny("llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    in_process(*merge(base, adapter, tmp_path / "merged")).ok()
    facts = json.loads((tmp_path / "merged" / "merge.json").read_text())
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert facts["base"] == {"name": base, "fingerprint": fingerprint(base)}
    assert facts["adapter"] == {"name": str(adapter), "sha256": digest}
    assert (facts["dtype"], facts["untied"], facts["tensors"]["merged"]) == ("float32", [], 14)
    assert 0 <= facts["tensors"]["largest_error"] < 1e-5 and facts["parity"]["relative_difference"] < 1e-3
    assert facts["versions"] == {name: version(name) for name in ("torch", "transformers", "peft")}


@pytest.mark.parametrize("told", [True, False])
def test_an_adapter_that_cannot_tell_its_base_is_merged_with_a_warning(told, tiny, tmp_path):
    """As plain peft saves one, into a base of another name than its config has."""
    base = tiny("llama")
    adapter, copied = save_adapter(base, tmp_path / "adapter"), shutil.copytree(base, tmp_path / "copied")
    if told:
        record_base(adapter, facts_of(base))
    ended = in_process(*merge(copied, adapter, tmp_path / "merged")).ok()
    assert (f"names {base} as its base, and has no base.json" in ended.stderr) != told
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["trained_here"] is told
    assert is_own(tmp_path / "merged") is told


def test_what_cannot_be_merged_is_said_before_anything_is_written(tiny, tmp_path):
    base, converter = tiny("llama"), tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    converter.parent.mkdir()
    converter.write_text("raise SystemExit(3)\n")
    adapter = save_adapter(base, tmp_path / "adapter")
    reward = save_adapter(base, tmp_path / "reward", AutoModelForSequenceClassification, task_type="SEQ_CLS")
    nameless, bare = (shutil.copytree(adapter, tmp_path / name) for name in ("nameless", "bare"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    for file in bare.glob("token*"):
        file.unlink()
    quantised = shutil.copytree(base, tmp_path / "quantised")
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (quantised / "config.json").write_text(json.dumps(json.loads((quantised / "config.json").read_text()) | settings))
    out = tmp_path / "out"
    cases = {
        "does not say which base": ["--peft_model_path", nameless, "--output_dir", out],
        "is not a model": merge(tmp_path / "gone", bare, out)[1:],
        "is quantised": merge(quantised, adapter, out)[1:],
        "leave --gguf out": [*merge(base, reward, out)[1:], "--gguf", converter.parent],
        "base model's own folder": merge(quantised, adapter, quantised)[1:],
        "converter failed, nothing was kept: exit": [
            *merge(base, adapter, out)[1:],
            "--gguf",
            converter.parent,
        ],
    }
    for said, flags in cases.items():
        ended = in_process("merge_peft_adapter.py", *flags)
        assert ended.code == (1 if "converter" in said else 2) and said in ended.errors[0], ended.stderr[-500:]
        assert "Traceback" not in ended.stderr and not out.exists()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_around_the_exchange(moment, tiny, tmp_path, monkeypatch):
    """Before it the folder is the adapter's, after it the merged model's, and the same command ends well."""
    adapter = save_adapter(tiny("llama"), tmp_path / "out")
    expected = in_memory(tiny("llama"), adapter)[1]

    def deadly(first, second):
        if moment == "after":
            exchange(first, second)
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(merge_peft_adapter, "exchange", deadly)
    assert killed(merge(tiny("llama"), adapter, adapter), monkeypatch)
    assert (adapter / "config.json").exists() == (moment == "after")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(adapter).eval()(IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    in_process(*merge(tiny("llama"), adapter, adapter)).ok()
    assert_merged(tiny("llama"), adapter / "adapter", adapter)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("call", [1, 2])
def test_killed_while_files_move_over_those_of_an_earlier_merge(call, tiny, tmp_path, monkeypatch):
    """What is half old and half new does not load."""
    adapter = save_adapter(tiny("llama"), tmp_path / "out")
    in_process(*merge(tiny("llama"), adapter, adapter)).ok()
    newer = save_adapter(tiny("llama"), tmp_path / "newer", use_rslora=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(newer / name, adapter / "adapter")
    replace, calls = os.replace, []

    def deadly(source, target):
        calls.append(target)
        if Path(target).parent == adapter and len([c for c in calls if Path(c).parent == adapter]) > call:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", deadly)
        patched.setattr(os.path, "ismount", lambda path: True)
        assert killed(merge(tiny("llama"), adapter, adapter), patched)
    assert not (adapter / "config.json").exists()
    in_process(*merge(tiny("llama"), adapter, adapter)).ok()
    assert_merged(tiny("llama"), newer, adapter)


def test_what_lies_below_the_output_folder_stays(tiny, tmp_path):
    """Also what is called as the files of a model: other models, checkpoints, the critic of an RL run."""
    adapter = save_adapter(tiny("llama"), tmp_path / "out")
    for name in ("config.json", "model.safetensors", "merge.json"):
        (adapter / "other").mkdir(exist_ok=True)
        (adapter / "other" / name).write_text("mine")
    for name in ("model-00001-of-00002.safetensors", "model.gguf"):
        (adapter / name).write_text("of an earlier merge")
    (adapter / "notes.txt").write_text("mine")
    in_process(*merge(tiny("llama"), adapter, adapter)).ok()
    assert {path.name: path.read_text() for path in (adapter / "other").iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors", "merge.json"), "mine"
    )
    assert (adapter / "notes.txt").read_text() == "mine"
    assert [path.name for path in adapter.glob("model*")] == ["model.safetensors"]
    assert_merged(tiny("llama"), adapter / "adapter", adapter)


def test_without_a_place_beside_the_output_folder(tiny, tmp_path, monkeypatch):
    """A mount point: the files move into it one by one, and the adapter aside."""
    adapter = save_adapter(tiny("llama"), tmp_path / "out")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    in_process(*merge(tiny("llama"), adapter, adapter)).ok()
    assert_merged(tiny("llama"), adapter / "adapter", adapter)
    assert not (adapter / ".merging").exists() and not (adapter / "adapter_config.json").exists()


@pytest.mark.parametrize("in_one_step", [True, False])
def test_two_folders_change_places(in_one_step, tmp_path, monkeypatch):
    """By renameat2, and by three renames where there is none."""
    if not in_one_step:
        monkeypatch.setattr(ctypes, "CDLL", lambda _, use_errno: SimpleNamespace())
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    exchange(tmp_path / "first", tmp_path / "second")
    assert [(tmp_path / name / "file").read_text() for name in ("first", "second")] == ["second", "first"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_an_adapter_of_2023(tiny, tmp_path):
    """peft saved adapter_model.bin then."""
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    in_process(*merge(tiny("llama"), adapter, tmp_path / "merged")).ok()
    assert_merged(tiny("llama"), adapter, tmp_path / "merged")


def test_adapters_that_are_not_merged_here(tiny, tmp_path):
    """PiSSA changes the base when it is loaded; IA3 is no LoRA. Neither may pass for merged."""
    pissa = save_adapter(tiny("llama"), tmp_path / "pissa", init_lora_weights="pissa")
    ended = in_process(*merge(tiny("llama"), pissa, tmp_path / "merged"))
    assert ended.code == 2 and "save it as plain LoRA" in ended.errors[0]
    config = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny("llama")), config).save_pretrained(tmp_path / "ia3")
    ended = in_process(*merge(tiny("llama"), tmp_path / "ia3", tmp_path / "merged"))
    assert ended.code == 2 and "only LoRA" in ended.errors[0]
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["{}.lora_A.weight", "{}.lora_B.weight"])
def test_an_adapter_that_lacks_a_tensor_is_not_taken(name, tiny, tmp_path):
    """peft would make up a random A or an empty B: a merge of nothing, proven right."""
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter", task_type="CAUSAL_LM")
    tensors = load_file(adapter / "adapter_model.safetensors")
    (tmp_path / "q.txt").write_text("a question")
    lost = name.format("base_model.model.model.layers.1.mlp.up_proj")
    save_file(
        {("_orig_mod." if n == lost else "") + n: t for n, t in tensors.items()}, adapter / "adapter_model.safetensors"
    )
    asked = "inference.py", "--base_model", tiny("llama"), "--lora_model", adapter, "--data_file", tmp_path / "q.txt"
    for command in (
        merge(tiny("llama"), adapter, tmp_path / "merged"),
        (*asked, "--predictions_file", tmp_path / "a"),
    ):
        ended = in_process(*command)
        assert ended.code == 2 and "it lacks base_model.model.model.layers.1.mlp.up_proj" in ended.errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "q.txt"]


def test_an_adapter_of_a_deeper_model_is_not_taken(tiny, records, tmp_path):
    """peft would leave out what the base has no place for, and a merge of the rest would be proven right."""
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter", task_type="CAUSAL_LM")
    tensors = load_file(adapter / "adapter_model.safetensors")
    deeper = {name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in tensors.items()}
    save_file(deeper | tensors, adapter / "adapter_model.safetensors")
    (tmp_path / "q.txt").write_text("a question")
    asked = "inference.py", "--base_model", tiny("llama"), "--lora_model", adapter, "--data_file", tmp_path / "q.txt"
    for command in (
        merge(tiny("llama"), adapter, tmp_path / "merged"),
        (*asked, "--predictions_file", tmp_path / "a"),
        stage("sft", tiny("llama"), records, tmp_path / "sft", "--peft_path", adapter),
    ):
        ended = in_process(*command)
        assert ended.code == 2 and "it holds base_model.model.model.layers.2." in ended.errors[0], ended.stderr[-500:]
    assert not (tmp_path / "merged").exists() and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"layer_replication": [(0, 2), (1, 2)]}, "repeats layers of its base"),
        ({"alora_invocation_tokens": [5]}, "aLoRA does not support merging"),
        ({"init_lora_weights": "olora"}, "save it as plain LoRA"),
    ],
)
def test_kinds_that_peft_does_not_merge_are_refused(kind, message, tiny, tmp_path):
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter", task_type="CAUSAL_LM", **kind)
    ended = in_process(*merge(tiny("llama"), adapter, tmp_path / "merged"))
    assert ended.code == 2 and len(ended.errors) == 1 and message in ended.errors[0]
    assert not (tmp_path / "merged").exists()


SIZES = {
    "vocab_size": 400,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0}
READING_OTHERS = {  # Gemma 4 a row of its embedding, JetMoe what its experts' layers are made of
    "gemma4": lambda: Gemma4Config(text_config=SIZES | {"hidden_size_per_layer_input": 8, "head_dim": 8}),
    "jetmoe": lambda: JetMoeConfig(**SIZES, kv_channels=8, num_local_experts=2),
}


@pytest.mark.parametrize("family", READING_OTHERS)
def test_a_model_whose_parts_read_each_others_weights(family, tiny, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(READING_OTHERS[family]()).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter")
    in_process(*merge(tmp_path / "base", adapter, tmp_path / "merged")).ok()
    assert_merged(tmp_path / "base", adapter, tmp_path / "merged")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_was_not_merged_is_seen(dtype, tiny, tmp_path, monkeypatch):
    """Also a short-trained one, whose update is a thousandth of the weights, in a coarse dtype."""
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter", lora_alpha=0.1)
    monkeypatch.setattr(LoraLinear, "merge", lambda self, **kwargs: None)
    ended = in_process(*merge(tiny("llama"), adapter, tmp_path / "merged"), "--dtype", dtype)
    assert ended.code == 1 and "after the merge" in ended.errors[0] and not (tmp_path / "merged").exists()


def test_ctrl_c_leaves_nothing(tiny, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("arguments.streamed.save_merged", stopped)
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    ended = in_process(*merge(tiny("llama"), adapter, tmp_path / "merged"))
    assert ended.code == 130 and "Traceback" not in ended.stderr and not (tmp_path / "merged").exists()


def test_sigterm_leaves_nothing(tiny, tmp_path, monkeypatch):
    """Also a second one, while the first is being heeded."""
    remove, killed = shutil.rmtree, lambda: os.kill(os.getpid(), signal.SIGTERM)
    kept = signal.getsignal(signal.SIGTERM)

    def removed(folder, **kwargs):
        if Path(folder).exists():
            killed()
        remove(folder, **kwargs)

    def stopped(*_):
        monkeypatch.setattr("shutil.rmtree", removed)
        killed()

    monkeypatch.setattr("arguments.streamed.save_merged", stopped)
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    ended = in_process(*merge(tiny("llama"), adapter, tmp_path / "merged"))
    assert ended.code == 143 and not (tmp_path / "merged").exists() and signal.getsignal(signal.SIGTERM) == kept


def test_upload(tiny, tmp_path, monkeypatch):
    """What goes to the hub is the merged model, without the adapter in the same folder."""
    calls = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **kwargs: calls.append((name, kwargs)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: calls.append(kwargs))
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    in_process(*merge(tiny("llama"), adapter, adapter), "--push_to_hub", "me/model").ok()
    (name, created), sent = calls
    assert name == "me/model" and created["private"] and sent["repo_id"] == "me/model"
    paths = [str(path.relative_to(adapter)) for path in adapter.rglob("*") if path.is_file()]
    patterns = {key: sent[key] for key in ("allow_patterns", "ignore_patterns")}
    uploaded = set(filter_repo_objects(paths, **patterns))
    assert {"config.json", "model.safetensors", "tokenizer.json", "merge.json"} <= uploaded
    assert not any(path.startswith("adapter/") for path in uploaded)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (LocalTokenNotFoundError("log in"), 2, "--push_to_hub me/model: log in"),
        (OfflineModeIsEnabled("off"), 1, "off"),
    ],
)
def test_a_hub_that_will_not_take_the_model_is_said_before_the_merge(error, code, said, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(HfApi, "whoami", Mock(side_effect=error))
    adapter = save_adapter(tiny("llama"), tmp_path / "adapter")
    ended = in_process(*merge(tiny("llama"), adapter, tmp_path / "merged"), "--push_to_hub", "me/model")
    assert ended.code == code and said in ended.errors[0] and not (tmp_path / "merged").exists()


def test_after_a_merge_in_place_the_adapter_has_its_tokenizer(tiny, tmp_path):
    adapter, own = save_adapter(tiny("llama"), tmp_path / "out"), "{{ messages[-1]['content'] }}"
    (adapter / "chat_template.jinja").write_text(own)
    record_base(adapter, facts_of(tiny("llama")))
    in_process(*merge(tiny("llama"), adapter, adapter)).ok()
    assert (adapter / "adapter" / "base.json").exists() and not (adapter / "base.json").exists(), "it is the adapter's"
    in_process(*merge(tiny("llama"), adapter / "adapter", tmp_path / "again")).ok()
    assert AutoTokenizer.from_pretrained(tmp_path / "again").chat_template == own


def test_an_adapter_in_the_way_stays(tiny, tmp_path):
    """It belongs to another stage, and moving it aside would hide it."""
    first, other = (save_adapter(tiny("llama"), tmp_path / name) for name in ("first", "other"))
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    ended = in_process(*merge(tiny("llama"), first, other))
    assert ended.code == 2 and "other holds another adapter" in ended.errors[0]
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


def test_two_merges_into_one_folder(tiny, tmp_path, monkeypatch):
    adapter, output = save_adapter(tiny("llama"), tmp_path / "adapter"), tmp_path / "merged"
    (output / ".merging").mkdir(parents=True)
    (output / ".merging" / "config.json").write_text("{}")
    monkeypatch.setattr("arguments.atomic.PATIENCE", 0)
    held = os.open(output, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    ended = in_process(*merge(tiny("llama"), adapter, output))
    assert ended.code == 2 and "another run is writing there" in ended.errors[0]
    assert [path.name for path in output.rglob("*")] == [".merging", "config.json"], "that is the other run's"
    os.close(held)
    in_process(*merge(tiny("llama"), adapter, output)).ok()


def test_a_merge_that_does_not_prove_itself_leaves_nothing(tiny, tmp_path):
    """A number that float16 cannot hold; an adapter with NaN."""
    base = tiny("llama")
    adapter = save_adapter(base, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    cases = ((1e6, "float16", 1, "nothing was kept"), (float("nan"), "float32", 2, "holds NaN"))
    for value, dtype, code, message in cases:
        broken = shutil.copytree(adapter, tmp_path / f"broken-{value}")
        name = next(name for name in weights if "lora_B" in name)
        save_file(weights | {name: weights[name] + value}, broken / "adapter_model.safetensors")
        ended = in_process(*merge(base, broken, tmp_path / "merged"), "--dtype", dtype)
        assert ended.code == code and message in ended.errors[0] and "Traceback" not in ended.stderr
        assert not (tmp_path / "merged").exists()
