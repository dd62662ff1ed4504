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
from conftest import ADAPTER, SCRIPTS, in_process, stage
from safetensors.torch import load_file

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
