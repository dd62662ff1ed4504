"""What the documents say exists: the files they link to, the scripts they call, and every flag they name."""

import dataclasses
import re
import shlex

import pytest
from conftest import ROOT

from arguments import AdapterArguments, DataArguments, GuardArguments, ModelArguments, RewardSourceArguments
from arguments.command_line import RENAMED_FLAGS
from inference import InferenceArguments
from merge_peft_adapter import MergeArguments
from pretraining import PretrainingArguments
from reward_modeling import RewardArguments
from rl_training import PPOArguments
from supervised_finetuning import FinetuningArguments

COMMON = ModelArguments, AdapterArguments, DataArguments
GROUPS = {
    "pretraining.py": (*COMMON, PretrainingArguments),
    "supervised_finetuning.py": (*COMMON, FinetuningArguments),
    "reward_modeling.py": (*COMMON, RewardArguments),
    "rl_training.py": (*COMMON, RewardSourceArguments, GuardArguments, PPOArguments),
    "merge_peft_adapter.py": (MergeArguments,),
    "inference.py": (InferenceArguments,),
}
GROUPS |= {f"run_{name}.sh": GROUPS[script] for name, script in zip(("pt", "sft", "rm", "rl"), GROUPS, strict=False)}
# Of bash, torchrun, sbatch, python, pip and the benchmarks, and of other projects, where the text says so
OTHERS = {"--nodes", "--kills", "--help", "--model", "--rows", "--samples", "--gpus", "--only_cpu", "--nproc_per_node"}
OTHERS |= {"--model_args", "--tasks", "--include_path", "--device", "--batch_size", "--port"}  # of lm_eval
OTHERS |= {"--enable", "--max", "--logprobs"}  # of vllm serve, up to their first hyphen
PAGES = [ROOT / "README.md", ROOT / "README_ZH.md", ROOT / "data/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def flags(script: str) -> set[str]:
    return {f"--{field.name}" for group in GROUPS[script] for field in dataclasses.fields(group) if field.init}


def commands(page) -> list[list[str]]:
    """Each command of the page's bash blocks, as words; comments are left out."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_flags(page):
    text = page.read_text("utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    known = set(RENAMED_FLAGS) | OTHERS | {flag for script in GROUPS for flag in flags(script)}
    assert not set(re.findall(r"(?<![\w-])--[a-z]\w+", text)) - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page):
    for words in commands(page):
        words = words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]
        if words[0] not in ("bash", "python"):
            continue
        assert (ROOT / words[1]).exists(), words
        script = words[1].rpartition("/")[2]
        if script in GROUPS:
            named = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert not named - flags(script) - {"--help"}, words


def test_there_are_commands():
    found = [words for page in PAGES for words in commands(page)]
    assert len(found) > 15 and sum("run_pipeline.sh" in " ".join(words) for words in found) >= 3
