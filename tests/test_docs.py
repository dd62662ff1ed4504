"""What the documents say exists and runs: the files they link to, every flag they name, every command they show."""

import os
import re
import shlex
import shutil
import subprocess
from functools import reduce

import pytest
from conftest import ROOT, SCRIPTS

from arguments.command_line import RENAMED_FLAGS, known_flags
from inference import InferenceArguments
from merge_peft_adapter import MergeArguments
from scripts.check_inputs import STAGES

GROUPS = dict(zip(SCRIPTS.values(), STAGES.values(), strict=True))
GROUPS |= {"merge_peft_adapter.py": (MergeArguments,), "inference.py": (InferenceArguments,)}
GROUPS |= {f"run_{stage}.sh": groups for stage, groups in STAGES.items()}
# Of bash, torchrun, sbatch, python, pip and the benchmarks, and of other projects, where the text says so
OTHERS = {"--nodes", "--kills", "--help", "--model", "--rows", "--samples", "--gpus", "--only_cpu", "--nproc_per_node"}
OTHERS |= {"--model_args", "--tasks", "--include_path", "--device", "--batch_size", "--port"}  # of lm_eval
OTHERS |= {"--enable", "--max", "--logprobs", "--runner"}  # of vllm serve, up to their first hyphen
OTHERS |= {"--medicalgpt", "--records", "--repeats", "--plot", "--time"}
PAGES = [ROOT / "README.md", ROOT / "README_ZH.md", ROOT / "data/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def flags(script: str) -> set[str]:
    return known_flags(*GROUPS[script])


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


# What other tests run (the pipeline, several GPUs and machines, the page in the browser) or this test is part of
ELSEWHERE = ("run_pipeline.sh", "run_tests.sh", "GPUS=", "NNODES=", "--web", "--deepspeed", "--fsdp")
BRIEF = ["--max_steps", "1", "--max_train_samples", "8", "--max_eval_samples", "4", "--report_to", "none"]
BRIEF_IN = {"pt": ["--block_size", "32"], "rl": ["--max_target_length", "8", "--batch_size", "4"]}
BRIEF_IN["rl"] += ["--mini_batch_size", "4"]


@pytest.fixture
def house(tiny, tmp_path):
    """A copy of the project, in which a small random model has the place of each that the documents name."""
    away = shutil.ignore_patterns(".*", "models", "outputs*", "__pycache__")
    house = shutil.copytree(ROOT, tmp_path / "house", ignore=away)
    (house / "models").mkdir()
    for place, family in (("models/SmolLM2-135M-Instruct", "llama"), ("bloom-560m", "bloom")):
        shutil.copytree(tiny(family), house / place)
    (house / "questions.txt").write_text("What is flu?\n流感有什么症状？\n", "utf-8")
    (reward,) = re.findall(r"```python\n(def one_sentence.*?)```", (ROOT / "docs/rl.md").read_text("utf-8"), re.DOTALL)
    (house / "rewards.py").write_text(reward)
    return house


def ran(words: list[str], house, python: str) -> str | None:
    """Run a command of the documents in `house`, cut short; returns what it said if it failed."""
    mine = "data/reward/" if "run_rm" in " ".join(words) else "data/pretrain/"
    names = {"/path/to/base": "models/SmolLM2-135M-Instruct", "mine/chat": "data/finetune/train", "mine/": mine}
    here = [reduce(lambda word, name: word.replace(name, names[name]), names, word) for word in words]
    variables = dict(word.split("=", 1) for word in here if re.match(r"[A-Z_]+=", word))
    command = here[len(variables) :]
    if here != words:  # another base or other records than those of the command before it
        variables = {"OUTPUT": "outputs/other", "MERGED": "outputs/other-merged"} | variables
        shutil.rmtree(house / "outputs/other", ignore_errors=True)
    if (script := command[1].rpartition("/")[2]) in GROUPS and "--help" not in command:
        name = {"rl_training.py": "rl"}.get(script, script.removeprefix("run_").removesuffix(".sh"))
        command += [*BRIEF, *BRIEF_IN.get(name, [])] if script not in ("merge_peft_adapter.py", "inference.py") else []
    command = [python, *command[1:]] if command[0] == "python" else command
    environment = os.environ | {"PYTHON": python} | variables
    ended = subprocess.run(
        command, cwd=house, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    return f"{words}: {ended.stderr[-1500:]}" if ended.returncode else None


@pytest.mark.slow
def test_every_command_runs(house, warm_python):
    """In the order of the stages, each once; a chat ends with its input."""
    found = {tuple(words): words for page in PAGES for words in commands(page)}.values()
    chosen = [w for w in found if {"bash", "python"} & set(w) and not any(x in " ".join(w) for x in ELSEWHERE)]
    order = ("run_pt", "run_sft", "run_rm", "run_rl", "merge", "rl_training", "inference")

    def place(words):
        return next((i for i, name in enumerate(order) if name in " ".join(words)), len(order))

    trained = ["pretraining.py", "--model_name_or_path", "bloom-560m", "--output_dir", "outputs-pt-v1", *BRIEF]
    folders = ["--train_file_dir", "data/pretrain/train", "--validation_file_dir", "data/pretrain/validation"]
    at_hand = ["python", *trained, *folders, "--block_size", "32"]  # of migrating.md
    assert ran(at_hand, house, warm_python) is None
    said = [ran(words, house, warm_python) for words in sorted(chosen, key=place)]
    assert len(chosen) >= 14 and not any(said), "\n\n".join(filter(None, said))
