"""scripts/pipeline.slurm beside a stand-in for srun and scontrol, which treats signals as Slurm's sources do."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

# SIGTERM kills all of a task, SIGUSR1 goes to its first process; when that ends, what it left behind is killed.
SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys

command = sys.argv[1:]
open("options", "w").write(" ".join(command[: command.index("bash")]))
task = subprocess.Popen(command[command.index("bash") :], env=os.environ | {"SLURM_NODEID": "0"}, process_group=0)

def kill(*_):
    task.kill()
    try:
        os.kill(int(open("stage").read()), signal.SIGKILL)
    except ProcessLookupError:
        open("nothing-left", "w")

signal.signal(signal.SIGTERM, kill)
signal.signal(signal.SIGUSR1, lambda *_: task.send_signal(signal.SIGUSR1))
code = task.wait()
kill()
open("code", "w").write(str(code))
sys.exit(code if code >= 0 else 128 - code)
"""
SCONTROL = """#!/bin/sh
if [ "$1" = requeue ]; then echo "$2" > requeued; else echo host-a; fi
"""
# As run_pipeline.sh and a run script within.
PIPELINE = """set -e
source scripts/env.sh
echo "$*" > arguments
echo "$NODE_RANK $NNODES $MASTER_ADDR" > place
supervise bash -ec 'source scripts/env.sh; supervise "$PYTHON" stage.py; echo merged > merged'
"""
STAGE = """import os, pathlib, signal, time

def save(*_):
    time.sleep(1.5)
    pathlib.Path("saved").touch()
    raise SystemExit(143)

signal.signal(signal.SIGTERM, save)
pathlib.Path("stage").write_text(str(os.getpid()))
time.sleep(0.1 if os.environ.get("SHORT") else 60)
"""


@pytest.fixture
def job(tmp_path):
    """job(*flags, **variables): the batch script of a job on one node, started."""
    commands = tmp_path / "bin"
    for path, text in (
        (commands / "srun", SRUN),
        (commands / "scontrol", SCONTROL),
        (tmp_path / "scripts/run_pipeline.sh", PIPELINE),
        (tmp_path / "stage.py", STAGE),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for name in ("pipeline.slurm", "env.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    given = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "host-a", "SLURM_CPUS_PER_TASK": "4"}
    given |= {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "PYTHON": sys.executable}

    def start(*flags: str, **variables: str) -> subprocess.Popen:
        command = ["bash", tmp_path / "scripts/pipeline.slurm", *flags]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | given | variables)

    return start


def read(folder, name: str) -> str:
    return (folder / name).read_text().strip()


def test_two_minutes_before_the_end_the_stage_saves_and_the_job_is_requeued(job, tmp_path):
    batch, deadline = job(), time.monotonic() + 30
    while not (tmp_path / "stage").exists():
        assert batch.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(20) == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists() and not (tmp_path / "merged").exists()
    assert read(tmp_path, "requeued") == "7"
    assert read(tmp_path, "code") == "0", "srun would kill the tasks of other nodes"
    assert (tmp_path / "nothing-left").exists()


@pytest.mark.parametrize(
    ("nodes", "restarts", "expected"),
    [("1", "0", "--fresh --seed 1"), ("2", "0", "--fresh --seed 1"), ("1", "2", "--seed 1")],
)
def test_a_requeued_job_goes_on(nodes, restarts, expected, job, tmp_path):
    given = {"SLURM_NNODES": nodes, "SLURM_RESTART_COUNT": restarts, "SHORT": "yes"}
    assert job("--fresh", "--seed", "1", **given).wait(20) == 0
    assert read(tmp_path, "arguments") == expected and (tmp_path / "merged").exists()
    assert read(tmp_path, "place") == f"0 {nodes} host-a" and "--cpus-per-task=4" in read(tmp_path, "options")
    assert not (tmp_path / "requeued").exists()
