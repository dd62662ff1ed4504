"""kill -9 at random moments of every stage, then the same command again: the weights of a run left alone.

Four kills a stage; KILLS=20 bash scripts/run_tests.sh tests/test_kills.py makes more, about four seconds each.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ADAPTER, SCRIPTS, in_process, merge, stage
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

KILLS = int(os.environ.get("KILLS", 4))


def forked(command: list, kill_after: float | None = None) -> int:
    """Exit code of a stage in a child of this process, which has the imports done; -9 when it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = in_process(*command).code
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # a child that has ended already stays until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tell(name: str, survived: int) -> None:
    """For benchmarks/faults.py."""
    if path := os.environ.get("KILLS_REPORT"):
        with open(path, "a") as file:
            file.write(f"{name},{survived}\n")


def trained(output: Path) -> dict[str, torch.Tensor]:
    files = [output / ADAPTER, *sorted(output.glob("value/*.safetensors"))]
    return {f"{file.name} {name}": tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_random_moments(name, tiny, records, tmp_path):
    flags = ("--max_steps", 4, "--save_steps", 1, "--per_device_train_batch_size", 2)
    if name == "rl":
        in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
        flags = ("--max_steps", 3, "--save_steps", 1, "--reward_model_name_or_path", tmp_path / "rm")
    whole = tmp_path / "whole"
    assert forked(stage(name, tiny("llama"), records, whole, *flags)) == 0
    started = time.perf_counter()
    assert forked(stage(name, tiny("llama"), records, tmp_path / "timed", *flags)) == 0
    seconds, expected = time.perf_counter() - started, trained(whole)

    moments, after_a_checkpoint = random.Random(name), 0
    for number in range(KILLS):
        output, moment = tmp_path / f"killed-{number}", (number + moments.random()) / KILLS * seconds
        command = stage(name, tiny("llama"), records, output, *flags)
        forked(command, kill_after=moment)
        after_a_checkpoint += any(output.glob("checkpoint-*"))
        assert forked(command) == 0, f"killed after {moment:.3f} s, it does not go on"
        found = trained(output)
        assert found.keys() == expected.keys()
        different = [key for key in found if not torch.equal(found[key], expected[key])]
        assert not different, f"killed after {moment:.3f} s: {different[:3]}"
        shutil.rmtree(output)
    assert after_a_checkpoint, "no kill fell behind a checkpoint: nothing was resumed"
    tell(name, KILLS)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(3, 40).unsqueeze(0)).logits


def assert_gives(folder: Path, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_merge_in_place_killed_at_random_moments(tiny, records, tmp_path):
    """At every moment from_pretrained(folder) gives the adapter's model: by the adapter before, merged after."""
    before = tmp_path / "before"
    in_process(*stage("sft", tiny("llama"), records, before)).ok()
    base = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    expected = logits(PeftModel.from_pretrained(base, before))
    started = time.perf_counter()
    shutil.copytree(before, tmp_path / "timed")
    assert forked(merge(tiny("llama"), tmp_path / "timed", tmp_path / "timed")) == 0
    seconds, moments, merged = time.perf_counter() - started, random.Random("merge"), 0
    for number in range(KILLS):
        output, moment = tmp_path / f"killed-{number}", (number + moments.random()) / KILLS * seconds
        shutil.copytree(before, output)
        forked(merge(tiny("llama"), output, output), kill_after=moment)
        merged += (output / "config.json").exists()
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(output)), expected, atol=1e-4, rtol=1e-4
        )
        assert forked(merge(tiny("llama"), output, output)) == 0, f"killed after {moment:.3f} s, it does not go on"
        assert (output / "adapter" / ADAPTER).exists() and not (output / "adapter_config.json").exists()
        torch.testing.assert_close(
            logits(AutoModelForCausalLM.from_pretrained(output)), expected, atol=1e-4, rtol=1e-4
        )
    assert merged < KILLS, "no kill fell into a merge"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "a leftover beside the folder"
    tell("merge in place", KILLS)
