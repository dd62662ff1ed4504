"""kill -9 at random moments of every stage, then the same command again: the weights of a run left alone.

Four kills a stage, each with a data cache of its own, so that some fall into reading and tokenizing; KILLS=20 bash
scripts/run_tests.sh tests/test_kills.py makes more, about four seconds each.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ADAPTER, SCRIPTS, in_process, merge, stage
from peft import PeftModel
from safetensors.torch import load_file
from tqdm.std import TqdmDefaultWriteLock
from transformers import AutoModelForCausalLM, Trainer

KILLS = int(os.environ.get("KILLS", 4))


def forked(
    command: list, kill_after: float | None = None, cache: Path | None = None, behind: Path | None = None
) -> int:
    """Exit code of a stage in a child of this process, which has the imports done; -9 when it was killed.

    With a `cache` of its own it reads and tokenizes what the tests before it have done already. It is not killed
    before there is a checkpoint in the folder `behind`.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # tqdm's lock is of all processes: a kill inside it would stop the parent for good
            TqdmDefaultWriteLock.acquire = TqdmDefaultWriteLock.release = lambda *_, **__: None
            datasets.config.HF_DATASETS_CACHE = cache or datasets.config.HF_DATASETS_CACHE
            code = in_process(*command).code
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        while behind and not any(behind.glob("checkpoint-*")):
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)  # a child that has ended already stays until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tell(name: str, faults: list[str]) -> None:
    """Fail with what went wrong, of all kills; the count of those survived goes to benchmarks/faults.py before."""
    if path := os.environ.get("KILLS_REPORT"):
        with open(path, "a") as file:
            file.write(f"{name},{KILLS - len(faults)}\n")
    assert not faults, f"{KILLS - len(faults)} of {KILLS} kills survived:\n" + "\n".join(faults)


def moments(name: str, seconds: float) -> list[float]:
    """When to kill: one random moment in each of KILLS equal parts of the time that a run takes."""
    numbers = random.Random(name)
    return [(part + numbers.random()) / KILLS * seconds for part in range(KILLS)]


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
    expected, started = trained(whole), time.perf_counter()
    assert forked(stage(name, tiny("llama"), records, tmp_path / "timed", *flags), cache=tmp_path / "cache") == 0
    assert list((tmp_path / "cache").rglob("*.arrow")), "the cache is another one"
    seconds, faults, after_a_checkpoint = time.perf_counter() - started, [], 0
    *early, last = moments(name, seconds)
    for moment in (*early, last):
        output, cache = tmp_path / f"killed-{moment:.3f}", tmp_path / f"cache-{moment:.3f}"
        command = stage(name, tiny("llama"), records, output, *flags)
        forked(command, moment, cache, behind=output if moment == last else None)  # a busy machine is late
        after_a_checkpoint += any(output.glob("checkpoint-*"))
        if forked(command, cache=cache) != 0:
            faults.append(f"killed after {moment:.3f} s, it does not go on")
        elif different := differences(trained(output), expected):
            faults.append(f"killed after {moment:.3f} s: {different[:3]}")
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
    tell(name, faults)
    assert after_a_checkpoint, "no kill fell behind a checkpoint: nothing was resumed"


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that only one has, or that are not the same bit for bit."""
    return [n for n in found | expected if n not in found or n not in expected or not found[n].equal(expected[n])]


@pytest.mark.parametrize("name", ["pt", "sft", "rm"])  # rl: tests/test_rl.py
def test_killed_inside_a_save(name, tiny, records, tmp_path, monkeypatch):
    """Weights and optimizer of the second checkpoint are there, the rest is not."""
    flags, calls = ("--max_steps", 3, "--save_steps", 1, "--per_device_train_batch_size", 2), []
    assert forked(stage(name, tiny("llama"), records, tmp_path / "whole", *flags)) == 0
    save = Trainer._save_rng_state

    def deadly(self, folder):
        calls.append(folder)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, folder)

    command = stage(name, tiny("llama"), records, tmp_path / "killed", *flags)
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_save_rng_state", deadly)
        assert forked(command) == -signal.SIGKILL
    again = in_process(*command).ok()
    assert "checkpoint-2: its saving was interrupted" in again.stderr and "checkpoint-1 (--fresh" in again.stderr
    assert not differences(trained(tmp_path / "killed"), trained(tmp_path / "whole"))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(3, 40).unsqueeze(0)).logits


def gives(folder: Path, expected: torch.Tensor) -> bool:
    """Whether from_pretrained(folder) is the model of these logits."""
    try:
        return torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), expected, atol=1e-4, rtol=1e-4)
    except (OSError, ValueError):  # it is not a model at all
        return False


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
    seconds, faults, merged = time.perf_counter() - started, [], 0
    for moment in moments("merge", seconds):
        output = shutil.copytree(before, tmp_path / f"killed-{moment:.3f}")
        command = merge(tiny("llama"), output, output)
        forked(command, moment)
        merged += (output / "config.json").exists()
        if not gives(output, expected):
            faults.append(f"killed after {moment:.3f} s, the folder gives another model")
        elif forked(command) != 0 or not gives(output, expected):
            faults.append(f"killed after {moment:.3f} s, it does not go on")
        elif not (output / "adapter" / ADAPTER).exists() or (output / "adapter_config.json").exists():
            faults.append(f"killed after {moment:.3f} s, the adapter is not where it belongs")
    tell("merge in place", faults)
    assert merged < KILLS, "no kill fell into a merge"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "a leftover beside the folder"
