"""What a run reports as it goes: seconds and tokens of its training steps alone, and its peak memory."""

import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from arguments.telemetry import LogLine, log_line, peak_memory

PAUSE = 0.4


class SlowEvaluation(LogLine, Trainer):
    def evaluate(self, *args, **kwargs):
        time.sleep(PAUSE)
        return super().evaluate(*args, **kwargs)


def test_evaluations_do_not_slow_the_steps_that_are_reported(tiny, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests' runs
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    ids, mask = torch.arange(5, 13), torch.tensor([1] * 6 + [0] * 2)
    rows = [{"input_ids": ids, "attention_mask": mask, "labels": ids}] * 4
    settings = {"per_device_train_batch_size": 1, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 4}
    args = TrainingArguments(str(tmp_path), **settings)
    trainer = SlowEvaluation(model, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "step_seconds" in row]
    assert len(logs) == 4 and all(row["step_seconds"] < PAUSE for row in logs)
    for row in logs:
        assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(6), "padding does not count"


def test_the_time_left_is_that_of_the_steps_left():
    line = log_line({"loss": 2.84567, "step": 10, "step_seconds": 2.0}, 60)
    assert line == "step 10/60 loss=2.846 step_seconds=2 left=0:01:40"


def test_peak_memory_where_the_system_tells_less(monkeypatch):
    """gVisor's /proc has no VmHWM."""
    known = peak_memory()["peak_rss_gib"]
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "VmSize: 9 kB\n")
    assert peak_memory()["peak_rss_gib"] >= known > 0.1
