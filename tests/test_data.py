"""The sample data: it parses, its splits are disjoint, length gives nothing away, and build.py and README are true."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from arguments.data import DataArguments

DATA = Path(__file__).resolve().parent.parent / "data"
FILES = sorted(
    path.relative_to(DATA).as_posix()
    for stage in ("pretrain", "finetune", "reward", "prompts")
    for path in (DATA / stage).rglob("*.jsonl")
)
LOADERS = {
    "pretrain": DataArguments.load_documents,
    "finetune": DataArguments.load_conversations,
    "reward": DataArguments.load_pairs,
    "prompts": DataArguments.load_prompts,
}
KINDS = {"wrong_fact", "unsafe", "evasive", "off_topic", "rambling"}


@cache
def rows(stage):
    """Train and validation rows of a stage, through the loader that its script calls."""
    args = DataArguments(str(DATA / stage / "train"), str(DATA / stage / "validation"))
    return [list(split) for split in LOADERS[stage](args)]


@cache
def records(file):
    return [json.loads(line) for line in (DATA / file).read_text("utf-8").splitlines()]


@pytest.mark.parametrize("stage", LOADERS)
def test_every_row_is_loaded(stage):
    for split, loaded in zip(("train", "validation"), rows(stage), strict=True):
        lines = sum(len(records(file)) for file in FILES if file.startswith(f"{stage}/{split}/"))
        assert len(loaded) == lines > 0


def questions(messages):
    return [m["content"] for m in messages if m["role"] == "user"]


TEXTS = {
    "documents": ("pretrain", lambda row: [row["text"]]),
    "SFT questions": ("finetune", lambda row: questions(row["messages"])),
    "SFT answers": ("finetune", lambda row: [m["content"] for m in row["messages"] if m["role"] == "assistant"]),
    "pairs' questions": ("reward", lambda row: questions(row["prompt"])),
    "chosen": ("reward", lambda row: [row["chosen"]]),
    "rejected": ("reward", lambda row: [row["rejected"]]),
    "prompts": ("prompts", lambda row: questions(row["prompt"])),
}


def texts(stage, get, split):
    return {text for row in rows(stage)[split] for text in get(row)}


@pytest.mark.parametrize(("stage", "get"), TEXTS.values(), ids=TEXTS)
def test_train_and_validation_are_disjoint(stage, get):
    assert texts(stage, get, 0) and texts(stage, get, 1)
    assert not texts(stage, get, 0) & texts(stage, get, 1)


def test_rl_prompts_are_worded_in_their_own_way():
    asked, tuned = (texts(*TEXTS[name], 0) | texts(*TEXTS[name], 1) for name in ("prompts", "SFT questions"))
    assert not asked & tuned


def longer_wins(pairs):
    gaps = [len(pair["response_chosen"]) - len(pair["response_rejected"]) for pair in pairs]
    return sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("reward")])
def test_length_in_characters_gives_nothing_away(file):
    assert {pair["kind"] for pair in records(file)} == KINDS
    assert 0.45 <= longer_wins(records(file)) <= 0.55
    for kind in KINDS:
        assert 0.4 <= longer_wins([pair for pair in records(file) if pair["kind"] == kind]) <= 0.6, kind


def test_build_reproduces_the_committed_files(tmp_path):
    shutil.copytree(DATA / "knowledge", tmp_path / "data" / "knowledge")
    build = [sys.executable, str(tmp_path / "data" / "knowledge" / "build.py")]
    output = subprocess.run(build, check=True, capture_output=True, text=True, cwd=tmp_path, timeout=60).stdout
    made = {p.relative_to(tmp_path / "data").as_posix(): p.read_bytes() for p in (tmp_path / "data").rglob("*.jsonl")}
    made = {file: content for file, content in made.items() if not file.startswith("knowledge/")}
    assert sorted(made) == FILES
    assert [file for file in FILES if made[file] != (DATA / file).read_bytes()] == []
    assert len(output.splitlines()) == len(FILES)


def readme_counts():
    """{file: rows} of the table in data/README.md, whose folder cell is empty where it goes on."""
    counts, stage = {}, None
    for line in (DATA / "README.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if len(cells) == 6 and cells[3].isdigit():
            stage = cells[0].strip("`/") or stage
            name = re.match(r"`([\w.]+)`", cells[2])[1]
            counts |= {f"{stage}/train/{name}": int(cells[3]), f"{stage}/validation/{name}": int(cells[4])}
    return counts


QUIZ = ("quiz/en.jsonl", "quiz/zh.jsonl")


@pytest.mark.parametrize("file", QUIZ)
def test_the_quiz_gives_nothing_away(file):
    questions = records(file)
    titles = {row["text"].split("\n")[0] for row in rows("pretrain")[0]}
    lengths = [[len(option) for option in q["options"]] for q in questions]
    right = [row[q["answer"]] for row, q in zip(lengths, questions, strict=True)]
    assert len({q["question"] for q in questions}) == len(questions)
    assert all(len(set(q["options"])) == 4 and q["source"] in titles for q in questions)
    assert max(sum(q["answer"] == i for q in questions) for i in range(4)) <= 0.3 * len(questions)
    for extreme in (max, min):
        share = sum(own == extreme(row) for own, row in zip(right, lengths, strict=True)) / len(questions)
        assert 0.2 <= share <= 0.3


def test_readme_tells_the_true_numbers():
    assert readme_counts() == {file: len(records(file)) for file in FILES}
    text = " ".join((DATA / "README.md").read_text("utf-8").split())
    shares = [
        f"{longer_wins(records(f'reward/{s}/{lang}.jsonl')):.3f}"
        for s in ("train", "validation")
        for lang in ("en", "zh")
    ]
    assert "{} / {} (English / Chinese) on train and {} / {} on validation".format(*shares) in text
