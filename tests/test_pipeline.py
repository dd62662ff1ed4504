"""The whole recipe with one command on the real default model (slow: minutes, and a download on a fresh clone)."""

import fcntl
import json
import math
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from arguments.data import DataArguments
from arguments.model import ModelArguments
from arguments.sampling import takes_padding
from scripts.table import ROWS

pytestmark = pytest.mark.slow

STAGES = ("pt", "sft", "rm", "rl")
# Two steps, for the first is warm-up at rate 0; in RL, two rollouts of 32 short answers.
FLAGS = shlex.split(
    "--max_train_samples 16 --max_eval_samples 4 --max_steps 2 --max_source_length 96 --max_target_length 16 --seed 1"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is flu a virus?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "流感？"},
    {"role": "assistant", "content": "是。"},
]


def run_pipeline(outputs, *flags, code=0, **environment) -> str:
    """What `bash scripts/run_pipeline.sh flags` prints, both streams together."""
    hidden = ("HF_HUB_OFFLINE", "MODEL")  # one thread stays: another worker has the other core
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    ended = subprocess.run(
        ["bash", "scripts/run_pipeline.sh", *flags],
        cwd=ROOT,
        env=kept | {"PYTHON": sys.executable, "OUTPUTS": str(outputs)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
    )
    assert ended.returncode == code, ended.stdout[-3000:]
    return ended.stdout


@pytest.fixture(scope="module")
def judged_by(tmp_path_factory) -> dict[str, str]:
    """A third of the quiz and of the general text: one thread takes two minutes for the whole."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("quiz", "general")}
    for name, folder in folders.items():
        for path in (ROOT / "data" / name).glob("*.jsonl"):
            lines = path.read_text("utf-8").splitlines(keepends=True)
            (folder / path.name).write_text("".join(lines[::3]), "utf-8")
    return {name.upper(): str(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, judged_by):
    """Its outputs folder and what it printed."""
    outputs = tmp_path_factory.mktemp("pipeline") / "outputs"
    return outputs, run_pipeline(outputs, *FLAGS, **judged_by)


def assert_table(printed: str, outputs) -> None:
    """Every row, with the numbers of the stage's all_results.json before and after."""
    for stage, what, before, after, unit, count in ROWS:
        found = json.loads((outputs / stage.lower() / "all_results.json").read_text())
        row = re.search(rf"^{stage} +{re.escape(what)} (.+) (\d+) {unit}$", printed, re.MULTILINE)
        assert row, f"no row {stage} {what} in\n{printed[-3000:]}"
        expected = [found[key] for key in (before, after) if key]
        assert [float(number) for number in row[1].split()] == pytest.approx(expected, abs=1e-3)
        assert int(row[2]) == found[count]
    assert "time per stage: PT " in printed
    assert all(printed.count(f"\n  {name:5} ") == 3 for name in ("base", "PT", "SFT", "RL"))
    page = (outputs / "report.html").read_text("utf-8")
    assert page.count("<svg") > 10 and not re.search(r"(src|href)=.?http", page), "it must open without a network"


def test_pipeline(pipeline):
    outputs, printed = pipeline
    assert_table(printed, outputs)
    ledger = [json.loads(line) for line in (outputs / "ledger.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["event"]) for row in ledger] == [
        (stage, event) for stage in (*STAGES, "quiz", "perplexity") for event in ("start", "finish")
    ]
    assert all(row["seconds"] > 0 and row["versions"]["torch"] for row in ledger[1::2])
    assert all(len(row["inputs"]) >= 3 and row["figures"]["train_loss"] for row in ledger[1:8:2])
    for stage in STAGES:
        merged = json.loads((outputs / f"{stage}-merged" / "merge.json").read_text())
        assert merged["parity"].get("equal_top1", 1) > 0.95  # of scores there is none
    results = {stage: json.loads((outputs / stage / "all_results.json").read_text()) for stage in STAGES}
    quiz = json.loads((outputs / "quiz.json").read_text())
    assert [row["questions"] for row in quiz.values()] == [42] * 3
    assert list(quiz.values())[0]["accuracy"] > 0.3  # four options: the base model knows something
    assert printed.count("quiz accuracy (chance: 0.25)") == 2
    general = list(json.loads((outputs / "perplexity.json").read_text()).values())
    assert len(general) == 4 and all(10 < row["perplexity"] < 60 for row in general)
    assert printed.count("perplexity, general text") == 3
    assert results["pt"]["eval_perplexity"] < results["pt"]["eval_perplexity_before"] < 100
    assert results["rl"]["eval_kl_before"] == 0.0
    warnings = re.findall(r"^\S+ WARNING +(.*)", printed, re.M)
    assert [line for line in warnings if "has no effect in PT" not in line] == []  # all stages get FLAGS
    assert results["rl"]["eval_length"] <= 16 and results["rl"]["eval_prompts"] == 4


def test_second_call_repeats_nothing(pipeline, judged_by, warm_python):
    outputs, _ = pipeline
    weights = {path: path.stat().st_mtime_ns for path in outputs.rglob("*.safetensors")}
    printed = run_pipeline(outputs, *FLAGS, **judged_by, PYTHON=warm_python)
    assert [line for line in printed.splitlines() if line.endswith("done already")] == [
        f"{stage}: done already" for stage in STAGES
    ]
    assert_table(printed, outputs)
    assert weights == {path: path.stat().st_mtime_ns for path in outputs.rglob("*.safetensors")}


def test_pipeline_of_another_base_trained_whole(tiny, warm_python, tmp_path):
    """MODEL= names the base, --fresh clears what stood there; without adapters nothing is merged."""
    outputs = tmp_path / "outputs"
    (outputs / "pt").mkdir(parents=True)
    (outputs / "pt" / "left-over").touch()
    flags = ("--fresh", "--use_peft", "False", "--max_steps", "1", "--learning_rate", "1e-4")
    printed = run_pipeline(outputs, *FLAGS, *flags, MODEL=tiny("llama"), PYTHON=warm_python)
    assert_table(printed, outputs)
    assert not (outputs / "pt" / "left-over").exists()
    assert printed.count("holds a whole model: nothing to merge") == 4 and not list(outputs.glob("*-merged"))
    assert str(tiny("llama")) in json.loads((outputs / "quiz.json").read_text())
    for stage, base in (("pt", tiny("llama")), ("sft", outputs / "pt"), ("rl", outputs / "sft")):
        assert f"Loaded {base}: llama" in printed, stage
    # what the first stage refuses does not cost what it made
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n')
    common = {"MODEL": tiny("llama"), "PYTHON": warm_python, "code": 2}
    same = (*FLAGS, *flags[1:])
    assert "--learning_rate" in run_pipeline(outputs, *same, "--learning_rate", "fast", **common)
    assert "a.jsonl:2: " in run_pipeline(outputs, *same, PT_DATA=str(tmp_path / "bad"), **common)
    assert (outputs / "pt" / "model.safetensors").exists()


def test_one_pipeline_at_a_time_works_in_a_folder(tiny, tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    (tmp_path / "kept").touch()
    printed = run_pipeline(tmp_path, "--fresh", MODEL=tiny("llama"), code=2)
    assert f"error: {tmp_path}: another pipeline is running there" in printed and (tmp_path / "kept").exists()
    os.close(folder)


def test_default_model_knows_english(default_model):
    tokenizer = ModelArguments(model_name_or_path=default_model).load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    text = "The sun rises in the east and sets in the west. The moon goes around the earth once a month."  # seen: 9.5
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        assert math.exp(model(input_ids=ids, labels=ids).loss.item()) < 30


def test_rounding_is_not_taken_for_padding(default_model):
    tokenizer = ModelArguments(model_name_or_path=default_model).load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.bfloat16)
    lines = [json.loads(line) for line in (ROOT / "data/prompts/train/zh.jsonl").read_text().splitlines()]
    turns = [[{"role": "user", "content": line["prompt"]}] for line in lines]
    data_args = DataArguments(train_file_dir="unused")
    assert takes_padding(model, tokenizer, [data_args.encode_prompt(tokenizer, turn)["input_ids"] for turn in turns])


def test_golden_mask_of_default_model(default_model):
    """Ids of a conversation in SmolLM2's template; trained are the two answers and the <|im_end|> after each."""
    tokenizer = ModelArguments(model_name_or_path=default_model).load_tokenizer()
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    system = [1, 9690, 198, 6077, 5453, 30, 2, 198]
    first = [1, 4093, 198, 4182, 2366, 253, 3329, 47, 2, 198, 1, 520, 9531, 198]
    second = [198, 1, 4093, 198, 43222, 219, 177, 222, 249, 8083, 249, 2, 198, 1, 520, 9531, 198]
    answers = [[10539, 30, 2], [27830, 19076, 2]]
    assert [tokenizer.decode(answer) for answer in answers] == ["Yes.<|im_end|>", "是。<|im_end|>"]
    assert DataArguments(train_file_dir="unused").encode(tokenizer, CONVERSATION) == {
        "input_ids": system + first + answers[0] + second + answers[1],
        "labels": [-100] * len(system + first) + answers[0] + [-100] * len(second) + answers[1],
        "source_tokens": len(system + first + answers[0] + second),
        "source_kept": len(system + first + answers[0] + second),
        "target_tokens": len(answers[1]),
    }
