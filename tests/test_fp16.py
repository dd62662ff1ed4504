"""fp16 with loss scaling, as a T4 trains: PyTorch's autocast and GradScaler work on a CPU too.

accelerate leaves both out where there is no GPU, and so do we; here they are put back. What a GPU's own kernels make
of float16 is not seen so.
"""

import shutil

import pytest
import torch
from accelerate import Accelerator
from conftest import SCRIPTS, history, in_process, results, stage
from test_kills import trained
from transformers.trainer_utils import sort_checkpoints

from arguments.model import ModelArguments
from arguments.run import RunArguments

FAMILIES = ("bloom", "gemma3", "llama")


@pytest.fixture
def fp16(monkeypatch):
    """fp16(scale): from here on runs take float16, also for frozen weights. Returns the list of their loss scalers."""
    begin = Accelerator.__init__

    def take(scale: float) -> list[torch.amp.GradScaler]:
        scalers = []

        def init(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            assert self.mixed_precision == "fp16"
            scalers.append(torch.amp.GradScaler("cpu", init_scale=scale))
            self.native_amp, self.scaler = True, scalers[-1]

        def choose(self):
            self.precision, self.bf16, self.fp16 = "fp16", False, True

        monkeypatch.setattr(Accelerator, "__init__", init)
        monkeypatch.setattr(RunArguments, "_choose_precision", choose)
        monkeypatch.setattr(ModelArguments, "torch_dtype", lambda self: torch.float16)
        return scalers

    return take


def reward(name: str, model: str, records, folder) -> tuple:
    """Flags for a reward model made in `folder`, where the stage is one that takes it."""
    if name != "rl":
        return ()
    in_process(*stage("rm", model, records, folder)).ok()
    return ("--reward_model_name_or_path", folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["pt", "sft", "rm"])
def test_it_learns_as_float32(name, family, fp16, tiny, records, tmp_path):
    plain = stage(name, tiny(family), records, tmp_path / "fp32", "--precision", "fp32", "--eval_on_start")
    in_process(*plain).ok()
    scalers = fp16(2.0**10)
    in_process(*stage(name, tiny(family), records, tmp_path / "fp16", "--eval_on_start")).ok()
    assert scalers[-1].get_scale() == 2.0**10, "no step was skipped"
    for key in ("loss", "eval_loss"):
        expected = history(tmp_path / "fp32", key)
        assert len(expected) == (3 if key == "loss" else 2)
        found = history(tmp_path / "fp16", key)
        assert found != expected and found == pytest.approx(expected, abs=5e-3)  # seen: 0.0022 in llama's RM
    assert {tensor.dtype for tensor in trained(tmp_path / "fp16").values()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_ppo_starts_at_a_kl_of_zero_and_moves(family, fp16, tiny, records, tmp_path):
    flags = reward("rl", tiny(family), records, tmp_path / "rm")
    scalers = fp16(2.0**10)
    in_process(*stage("rl", tiny(family), records, tmp_path / "out", *flags, "--eval_on_start")).ok()
    found = results(tmp_path / "out")
    assert scalers[-1].get_scale() == 2.0**10
    assert found["eval_kl_before"] == 0 and 0 < abs(found["eval_kl"]) < 1
    assert found["eval_entropy"] == pytest.approx(found["eval_entropy_before"], abs=0.01)


def test_a_guard_in_the_first_step_of_a_process(fp16, tiny, records, tmp_path):
    """The scaler has no scale yet, and is asked to unscale the gradients of the step in which the run ends."""
    (tmp_path / "rewards.py").write_text(
        "def nan(completions, **columns):\n    return [float('nan')] * len(completions)\n"
    )
    fp16(2.0**10)
    flags = "--reward_functions", f"{tmp_path / 'rewards.py'}:nan"
    ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / "out", *flags)).ok()
    assert "Guard not_finite" in ended.stderr
    assert not any(tensor.any() for key, tensor in trained(tmp_path / "out").items() if "lora_B" in key)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_overflow_is_skipped_and_the_scale_outlives_a_kill(name, fp16, tiny, records, tmp_path):
    """With a scale too large at first; going on from the second checkpoint ends as a run left alone does."""
    out, flags = tmp_path / "out", reward(name, tiny("llama"), records, tmp_path / "rm")
    command = stage(name, tiny("llama"), records, out, *flags, "--max_steps", 10, "--save_steps", 2)
    scalers = fp16(2.0**22)
    in_process(*command, "--save_total_limit", 10).ok()
    expected, scale = trained(out), scalers[-1].get_scale()
    assert 1 < scale < 2.0**22 and any(tensor.any() for key, tensor in expected.items() if "lora_B" in key)
    for checkpoint in sort_checkpoints(out)[2:]:
        shutil.rmtree(checkpoint)
    ended = in_process(*command).ok()
    assert "Going on from" in ended.stderr
    assert trained(out).keys() == expected.keys() and scalers[-1].get_scale() == scale
    assert all(torch.equal(tensor, expected[key]) for key, tensor in trained(out).items())
