"""report.html: one self-contained page of a stage, or of the pipeline."""

import json
import re
import shutil
from unittest.mock import Mock

import pytest
from conftest import in_process, stage, write_lines

from arguments.atomic import append_lines, append_step, read_lines
from scripts.ledger import finish, start
from scripts.page import describe, write_page
from scripts.report import unseen_prompts


@pytest.fixture(scope="module")
def outputs(tiny, records, tmp_path_factory):
    """rm and rl as the pipeline leaves them, with a ledger, a guard that fired and answers in Chinese."""
    folder = tmp_path_factory.mktemp("outputs")
    for name in ("rm", "rl"):
        assert start(folder, name, [tiny("llama"), str(records / name)], ["--seed", "1"]) == "new"
        flags = ("--eval_on_start", "--hub_token", "hf_secret") if name == "rm" else ("--eval_on_start",)
        flags += ("--reward_model_name_or_path", folder / "rm") if name == "rl" else ()
        in_process(*stage(name, tiny("llama"), records, folder / name, *flags)).ok()
        finish(folder, name)
    guard = {"step": 3, "guard": "length", "reason": "answers had 4 tokens & have <40> now", "stopped": False}
    (folder / "rl" / "guards.jsonl").write_text(json.dumps(guard) + "\n")
    answers = [["流感有什么症状？", {"base": "<b>不知道</b>", "RL": "发热、咳嗽和肌肉疼痛。"}]]
    (folder / "answers.json").write_text(json.dumps(answers, ensure_ascii=False), "utf-8")
    return folder


def needs_network(page: str) -> bool:
    return bool(re.search(r"(src|href)\s*=\s*.?(https?:|//)|@import|url\(\s*.?http", page))


def test_the_pipeline_on_one_page(outputs):
    page = write_page(outputs).read_text("utf-8")
    assert not needs_network(page)
    assert "发热、咳嗽和肌肉疼痛。" in page and "&lt;b&gt;不知道" in page, "what a model says is shown, not run"
    assert "&lt;40&gt; now" in page and "hf_secret" not in page
    assert page.count('<li class="ended">') == 2 and page.count('<li class="to come">') == 2
    results = json.loads((outputs / "rm" / "all_results.json").read_text())
    assert f">{results['eval_margin']:.3f}</td>" in page
    for title in ("calibration of the reward model", "margins of held-out pairs", "rewards of held-out prompts", "kl"):
        assert f">{title}</text>" in page, f"no plot {title}"
    assert page.count("lengths of the training rows") == 2 and "8 training and 4 held-out records; of 8 read" in page
    assert "prefers-color-scheme" in page or "color-scheme: light dark" in page


def test_a_stage_that_started_over_began_then(tmp_path):
    rows = [
        {"stage": "pt", "event": "start", "inputs": {}, "flags": [flag], "time": 1e9 + 9e6 * i}
        for i, flag in enumerate("abb")
    ]
    began = [describe("pt", tmp_path, rows[:count])["began"] for count in (1, 2, 3)]
    assert began[0] < began[1] == began[2]


def test_one_stage_alone(outputs, tmp_path):
    folder = shutil.copytree(outputs / "rl", tmp_path / "rl")
    page = write_page(folder).read_text("utf-8")
    assert "<title>Stage RL</title>" in page and page.count("<li class=") == 1
    assert "--reward_model_name_or_path" in page and "transformers 5." in page
    assert not needs_network(page)


def test_a_page_of_files_that_were_cut_short(outputs, tmp_path):
    folder = shutil.copytree(outputs / "rm", tmp_path / "rm")
    for name in ("all_results.json", "trainer_state.json", "data.json"):
        (folder / name).write_text((folder / name).read_text()[:60])
    assert "<title>Stage RM</title>" in write_page(folder).read_text("utf-8")


def test_a_page_is_written_into_folders_of_runs_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    for words in ((), (tmp_path / "missing",), (tmp_path / "photos",)):
        ended = in_process("scripts/page.py", *words)
        assert ended.code == 2 and len(ended.errors) == 1 and "folder" in ended.errors[0].lower()
    assert [path.name for path in tmp_path.rglob("*")] == ["photos"]


def test_a_stage_without_a_ledger_has_a_page(outputs, tmp_path):
    folder = shutil.copytree(outputs / "rl", tmp_path / "rl")
    for asked in (folder, tmp_path):
        in_process("scripts/page.py", asked).ok()
        assert (asked / "report.html").exists()


def test_the_other_scripts_say_what_they_expect(outputs, tiny, tmp_path):
    models = [tiny("llama")] * 4
    cases = {
        "expected a folder and four models": ("scripts/report.py",),
        "expected a folder and four models: ": ("scripts/report.py", outputs),
        "missing/pt holds no whole all_results.json": ("scripts/report.py", tmp_path / "missing", *models),
        "expected the folder to make": ("scripts/get_default_model.py",),
    }
    for said, command in cases.items():
        ended = in_process(*command)
        assert ended.code == 2 and len(ended.errors) == 1 and said in ended.errors[0]


def test_the_default_model_makes_the_folder_above(tmp_path, monkeypatch):
    """Before it downloads anything."""
    monkeypatch.setattr("subprocess.run", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        in_process("scripts/get_default_model.py", tmp_path / "new" / "model")
    assert (tmp_path / "new").is_dir()


def test_rewards_that_are_not_finite_and_no_evaluation_before_training(outputs, tmp_path):
    folder = shutil.copytree(outputs / "rl", tmp_path / "rl")
    assert ">SFT model</text>" in write_page(folder).read_text("utf-8")
    (folder / "scores.jsonl").write_text('{"step": 4, "scores": [NaN, Infinity, 0.5]}\n')
    page = write_page(folder).read_text("utf-8")
    assert ">policy</text>" in page and ">SFT model</text>" not in page


def test_lines_are_added_behind_the_last_whole_one(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    for text, kept in (("", []), ('{"a": 1}\n{"b":', [{"a": 1}]), ('{"a": 1}', [{"a": 1}]), ('{"cut', [])):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        assert read_lines(path) == kept
        append_lines(path, [{"c": "\u4f60"}])
        assert read_lines(path) == [*kept, {"c": "\u4f60"}] and path.read_bytes().endswith(b"\n")


def test_an_evaluation_takes_the_place_of_those_of_its_step_and_later(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    for step, kept in ((0, [0]), (2, [0, 2]), (4, [0, 2, 4]), (4, [0, 2, 4]), (2, [0, 2])):
        append_step(path, [{"step": step, "text": "\u4f60"}, {"step": step, "score": float("inf")}])
        assert [row["step"] for row in read_lines(path)[::2]] == kept
        assert read_lines(path)[-2:] == [{"step": step, "text": "\u4f60"}, {"step": step, "score": float("inf")}]


def test_only_whole_lines_are_read(tmp_path):
    """JSON leaves characters raw that str.splitlines breaks at; a full disk cuts the last line short."""
    rows = [{"prompt": [{"role": "user", "content": f"{i}\u2028a\u2029b\x85c"}]} for i in range(4)]
    write_lines(tmp_path / "rl", rows, "samples.jsonl")
    with (tmp_path / "rl" / "samples.jsonl").open("ab") as file:
        file.write('{"prompt": "流'.encode()[:-1])
    assert read_lines(tmp_path / "rl" / "samples.jsonl") == rows and read_lines(tmp_path / "none.jsonl") == []
    assert unseen_prompts(tmp_path) == [row["prompt"] for row in rows[:3]]
    twice = [rows[i] | {"step": step} for step in (0, 4) for i in range(2)]
    write_lines(tmp_path / "rl", twice, "samples.jsonl")
    assert unseen_prompts(tmp_path) == [row["prompt"] for row in rows[:2]], (
        "of two held-out prompts each is asked once"
    )
