"""--gguf on the real default model (slow): the file that llama.cpp's converter makes, read back; and in llama.cpp.

The converter comes out of the source package of llama_cpp_python on PyPI (77 MB, kept); without a network the test
says so and is skipped. llama.cpp itself answers where that package is installed: a compiler builds it in 20 minutes.
"""

import json
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import in_process, merge
from test_merge import save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

pytestmark = pytest.mark.slow

SOURCE = (
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz"
)
KEPT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llama-cpp-converter"


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """A llama.cpp checkout, as far as its converter needs it; downloaded once."""
    if not (KEPT / "convert_hf_to_gguf.py").exists():
        try:
            archive, _ = urllib.request.urlretrieve(SOURCE)
        except (urllib.error.URLError, TimeoutError) as error:
            pytest.skip(f"llama.cpp's converter cannot be fetched: {error}")
        root = "llama_cpp_python-0.3.36/vendor/llama.cpp/"
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Debian 12's Python 3.11.2 has none
        with tarfile.open(archive) as packed:
            for member in packed.getmembers():
                member.name = member.name.removeprefix(root)
                if member.name.startswith(("gguf-py/", "conversion/", "convert_hf_to_gguf.py")):
                    packed.extract(member, KEPT, **safely)
        os.unlink(archive)
    return KEPT


@pytest.fixture(scope="module")
def merged(llama_cpp, default_model, tmp_path_factory) -> Path:
    """The default model with a random adapter merged into it, and model.gguf beside it."""
    folder = tmp_path_factory.mktemp("gguf")
    adapter = save_adapter(default_model, folder / "adapter", lora_alpha=1)
    in_process(*merge(default_model, adapter, folder / "merged"), "--gguf", llama_cpp).ok()
    return folder / "merged"


def test_it_reads_back_as_the_merged_model(merged):
    parity = json.loads((merged / "merge.json").read_text())["gguf"]
    assert parity["relative_difference"] < 0.05 and parity["equal_top1"] > 0.95


def test_a_head_size_that_is_not_the_default(llama_cpp, default_model, tmp_path):
    """transformers' reader does not find it in the file, for qwen3, and takes 128."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = Qwen3Config(vocab_size=49152, num_attention_heads=4, num_key_value_heads=2, **size)
    base = tmp_path / "base"
    Qwen3ForCausalLM(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(default_model).save_pretrained(base)
    adapter = save_adapter(str(base), tmp_path / "adapter")
    in_process(*merge(str(base), adapter, tmp_path / "merged"), "--gguf", llama_cpp).ok()
    parity = json.loads((tmp_path / "merged" / "merge.json").read_text())["gguf"]
    assert parity["relative_difference"] < 0.05


@torch.no_grad()
def test_llama_cpp_runs_it(merged):
    engine = pytest.importorskip("llama_cpp", reason="llama_cpp_python is not installed")
    ids = AutoTokenizer.from_pretrained(merged)("The treatment of asthma rests on inhaled medicines")["input_ids"]
    expected = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    model = engine.Llama(str(merged / "model.gguf"), logits_all=True, n_ctx=64, verbose=False)
    model.eval(ids)
    found = torch.from_numpy(np.array(model.scores[: len(ids)]))
    assert (found - expected).abs().max() < 0.1 * expected.std()
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95
