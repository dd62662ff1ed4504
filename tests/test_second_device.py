"""Every stage, answers and judges as on a Tesla T4: in fp16, on a device that does not mix with the CPU."""

import json
import shutil

import pytest
from conftest import ROOT, SCRIPTS, history, in_process, in_subprocess, results, stage, write_lines

pytestmark = pytest.mark.slow


def on_gpu(*command):
    return in_subprocess(ROOT / "tests" / "second_device.py", *command).ok()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_stage_computes_what_it_does_on_the_cpu(name, tiny, records, tmp_path):
    """Up to fp16's rounding; and goes on from a checkpoint, with its optimizer and loss scale."""
    flags = ("--eval_on_start", "--report_to", "none", "--save_steps", 1)
    if name == "rl":
        in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
        flags += ("--reward_model_name_or_path", tmp_path / "rm", "--critic", "adapter", "--max_steps", 2)
    gpu, cpu = tmp_path / "gpu", tmp_path / "cpu"
    ended = on_gpu(*stage(name, tiny("llama"), records, gpu, *flags))
    assert "Device Tesla T4; training in fp16" in ended.stderr
    in_process(*stage(name, tiny("llama"), records, cpu, "--precision", "fp32", *flags)).ok()
    figure = "eval_reward" if name == "rl" else "eval_loss"
    assert history(gpu, figure)[0] == pytest.approx(history(cpu, figure)[0], abs=2e-3)
    assert results(gpu)[figure] != history(gpu, figure)[0], "nothing was learned"

    whole = results(gpu)
    newest = max(gpu.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    shutil.rmtree(newest)
    on_gpu(*stage(name, tiny("llama"), records, gpu, *flags))
    assert results(gpu)[figure] == pytest.approx(whole[figure], abs=1e-6)


def test_answers_and_judges(tiny, records, tmp_path):
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    (tmp_path / "questions.txt").write_text("What is flu?\n高血压要注意什么？\nAnd why?\n")
    flags = ("--data_file", tmp_path / "questions.txt", "--max_new_tokens", 8, "--predictions_file")
    models = (tiny("llama"), tiny("qwen3"))
    compared = ("--reward_model", tmp_path / "rm", *flags, tmp_path / "compared.jsonl")
    on_gpu("inference.py", "--compare", *models, *compared)
    rows = [json.loads(line) for line in (tmp_path / "compared.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 3 and all(row["Score"].keys() == set(models) for row in rows)
    quiz = [{"question": "Is flu a virus?", "options": ["yes", "no", "a fungus"], "answer": 0}] * 3
    write_lines(tmp_path / "quiz", quiz, "en.jsonl")
    for script, folder in (("quiz", tmp_path / "quiz"), ("perplexity", records / "pt")):
        there, here = (run(f"scripts/{script}.py", folder, models[0]).stdout for run in (on_gpu, in_process))
        figure = {"quiz": "accuracy", "perplexity": "perplexity"}[script]
        there, here = (json.loads(printed)[models[0]][figure] for printed in (there, here))
        assert there == pytest.approx(here, rel=2e-3)
