"""scripts/pipeline.slurm beside a stand-in for srun and scontrol, and on a real Slurm, where one is installed.

The stand-in treats signals as Slurm does with ProctrackType=proctrack/cgroup or /linuxproc. The real one has two
nodes, both on this machine; it needs root, slurmctld, slurmd and sbatch (Debian: slurmctld, slurmd, slurm-client).
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

# SIGTERM kills all of a task, SIGUSR1 goes to its first process or to all; when that one ends, what it left is killed.
SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys

command = sys.argv[1:]
open("options", "w").write(" ".join(command[: command.index("bash")]))
task = subprocess.Popen(command[command.index("bash") :], env=os.environ | {"SLURM_NODEID": "0"}, process_group=0)

def kill(*_):
    task.kill()
    try:
        os.kill(int(open("stage-0").read()), signal.SIGKILL)
    except ProcessLookupError:
        open("nothing-left", "w")

signal.signal(signal.SIGTERM, kill)
hand_on = os.killpg if os.environ["PROCTRACK"] == "linuxproc" else os.kill
signal.signal(signal.SIGUSR1, lambda *_: hand_on(task.pid, signal.SIGUSR1))
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
echo "$*" > arguments-$NODE_RANK
echo "$NNODES $MASTER_ADDR" > place-$NODE_RANK
echo "${CUDA_VISIBLE_DEVICES:-none} ${LAUNCH[*]: -1}" > devices-$NODE_RANK
supervise bash -ec 'source scripts/env.sh; supervise "$PYTHON" stage.py; echo merged > merged-$NODE_RANK'
"""
STAGE = """import os, pathlib, signal, time

rank = os.environ["NODE_RANK"]

def save(*_):
    time.sleep(1.5)
    pathlib.Path("saved-" + rank).touch()
    raise SystemExit(143)

signal.signal(signal.SIGTERM, save)
pathlib.Path("stage-" + rank).write_text(str(os.getpid()))
time.sleep(60 if os.environ.get("LONG") and not os.path.exists("saved-" + rank) else 0.1)
"""
CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
SlurmUser=root
StateSaveLocation={folder}
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
NodeName=node-0 NodeAddr=127.0.0.1 Port={first} Gres=gpu:4
NodeName=node-1 NodeAddr=127.0.0.1 Port={second} Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with the batch script, where its stages are stand-ins."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/run_pipeline.sh").write_text(PIPELINE)
    (tmp_path / "stage.py").write_text(STAGE)
    for name in ("pipeline.slurm", "env.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    return tmp_path


@pytest.fixture
def job(folder):
    """job(*flags, **variables): the batch script of a job on one node, started."""
    commands = folder / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    given = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "host-a", "SLURM_CPUS_PER_TASK": "4"}
    given |= {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHON": sys.executable, "PROCTRACK": "cgroup"}

    def start(*flags: str, **variables: str) -> subprocess.Popen:
        command = ["bash", folder / "scripts/pipeline.slurm", *flags]
        return subprocess.Popen(command, cwd=folder, env=os.environ | given | variables)

    return start


def read(folder, name: str) -> str:
    return (folder / name).read_text().strip()


def wait_for(what, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("proctrack", ["cgroup", "linuxproc"])
def test_two_minutes_before_the_end_the_stage_saves_and_the_job_is_requeued(proctrack, job, folder):
    batch = job(PROCTRACK=proctrack, LONG="yes")
    wait_for((folder / "stage-0").exists)
    time.sleep(0.2)
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(20) == 128 + signal.SIGTERM
    assert (folder / "saved-0").exists() and not (folder / "merged-0").exists()
    assert read(folder, "requeued") == "7"
    assert read(folder, "code") == "0", "srun would kill the tasks of other nodes"
    assert (folder / "nothing-left").exists()


@pytest.mark.parametrize(
    ("nodes", "restarts", "expected"),
    [("1", "0", "--fresh --seed 1"), ("2", "0", "--fresh --seed 1"), ("1", "2", "--seed 1")],
)
def test_a_requeued_job_goes_on(nodes, restarts, expected, job, folder):
    given = {"SLURM_NNODES": nodes, "SLURM_RESTART_COUNT": restarts}
    assert job("--fresh", "--seed", "1", **given).wait(20) == 0
    assert read(folder, "arguments-0") == expected and (folder / "merged-0").exists()
    assert read(folder, "place-0") == f"{nodes} host-a" and "--cpus-per-task=4" in read(folder, "options")
    assert not (folder / "requeued").exists()


@pytest.fixture(params=["cgroup", "linuxproc"])
def slurm(request, tmp_path_factory):
    """slurm(command, ...): what it prints, on a cluster of node-0 and node-1, this machine by other names."""
    if os.geteuid() or not all(map(shutil.which, ("slurmctld", "slurmd", "sbatch", "unshare"))):
        pytest.skip("needs root, slurmctld, slurmd and sbatch")
    if not os.path.isdir("/sys/fs/cgroup/freezer"):
        pytest.skip("needs control groups of version 1: Slurm asks systemd for those of version 2")
    here = tmp_path_factory.mktemp("slurm")
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for free in (one, two, three):
            free.bind(("127.0.0.1", 0))
        ports = {"port": one.getsockname()[1], "first": two.getsockname()[1], "second": three.getsockname()[1]}
    named = {"host": os.uname().nodename, "folder": here, "proctrack": request.param}
    (here / "slurm.conf").write_text(CONFIGURATION.format(**named, **ports))
    (here / "gres.conf").write_text("Name=gpu File=/dev/tty[0-3]\n")  # what it counts as GPUs
    (here / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
    environment = os.environ | {"SLURM_CONF": str(here / "slurm.conf"), "PYTHON": sys.executable, "LONG": "yes"}

    def run(*words: str) -> str:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    daemons = [["slurmctld", "-D", "-i"]]
    for node in ("node-0", "node-1"):
        (here / node).mkdir()
        daemons.append(["unshare", "--uts", "bash", "-c", f"hostname {node}; exec slurmd -D"])
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen(words, **quiet) for words in daemons]
    try:
        wait_for(lambda: run("sinfo", "-h", "-t", "idle", "-o", "%D") == "2")
        yield run
        run("scancel", "--user=root")
        wait_for(lambda: run("squeue", "-h") == "")
    finally:
        for daemon in reversed(started):
            daemon.terminate()
            daemon.wait(20)


@pytest.mark.slow
def test_two_nodes_of_a_real_slurm(slurm, folder):
    options = ("--parsable", "--chdir", str(folder), "--nodes=2", "--cpus-per-task=1")
    number = slurm("sbatch", *options, str(folder / "scripts/pipeline.slurm"), "--fresh", "--seed", "1")
    wait_for(lambda: all((folder / f"stage-{rank}").exists() for rank in (0, 1)))
    assert [read(folder, f"arguments-{rank}") for rank in (0, 1)] == ["--fresh --seed 1"] * 2
    assert [read(folder, f"devices-{rank}") for rank in (0, 1)] == ["0,1,2,3 4"] * 2, "a process for each GPU"
    time.sleep(0.2)
    slurm("scancel", "--batch", "--signal=TERM", number)  # as --signal=B:TERM@120 does
    wait_for(lambda: slurm("squeue", "-h", "-o", "%T") == "PENDING")
    assert all((folder / f"saved-{rank}").exists() for rank in (0, 1)), read(folder, f"slurm-{number}.out")
    assert not any((folder / f"merged-{rank}").exists() for rank in (0, 1))
    wait_for(lambda: slurm("squeue", "-h", "-o", "%T") == "", 120)
    assert [read(folder, f"arguments-{rank}") for rank in (0, 1)] == ["--seed 1"] * 2
    assert [read(folder, f"place-{rank}") for rank in (0, 1)] == ["2 node-0"] * 2
    assert all((folder / f"merged-{rank}").exists() for rank in (0, 1))
