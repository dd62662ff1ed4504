"""What the benchmarks share: one command in processes of its own, measured, and the name of the machine."""

import os
import platform
import re
import subprocess
import tempfile
import threading
import time
import venv
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
FACTORY_PACKAGES = ["torch==2.13.0", "llamafactory==0.9.5"]


def as_run_scripts() -> dict[str, str]:
    """The environment in which scripts/env.sh starts a stage: memory and threads as our users have them."""
    command = ["bash", "-c", "source scripts/env.sh; env -0"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return dict(line.split("=", 1) for line in printed.split("\0") if line)


def environment_of(name: str, packages: list[str]) -> Path:
    """The bin folder of an environment of its own in benchmarks/, made when missing."""
    home = ROOT / "benchmarks" / name
    if not (home / "made").exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([home / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
        (home / "made").touch()
    return home / "bin"


def measure(command: list, environment: dict) -> tuple[float, float, str]:
    """Seconds, peak memory (GiB) and printed text of a command that must succeed; run from the root.

    The peak is that of its largest process by the kernel's account, or, seen four times a second, of all its processes
    together, each page that several share counted once.
    """
    with tempfile.TemporaryFile("w+") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
        together, ended = [0], threading.Event()
        watch = threading.Thread(target=watched, args=(process.pid, together, ended))
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        ended.set()
        watch.join()
        file.seek(0)
        printed = file.read()
    if status:
        raise SystemExit(f"{command[1]} failed:\n{printed[-3000:]}")
    return seconds, max(usage.ru_maxrss / 2**20, max(together) / 2**30), printed


def watched(pid: int, together: list[int], ended: threading.Event) -> None:
    """Add to `together` the bytes that a process and its children hold, while there are children."""
    while not ended.wait(0.25):
        try:
            processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            if len(processes) > 1:
                together.append(sum(process.memory_full_info().pss for process in processes))
        except psutil.NoSuchProcess:  # it ended while it was looked at
            continue


def llama_factory() -> Path:
    """Its command line, in an environment of its own.

    The wheels of torchvision and torchaudio want CUDA's libraries. It does without the one, and imports the other for
    audio alone: an empty module takes its place.
    """
    python = environment_of(".llamafactory", FACTORY_PACKAGES) / "python"
    empty = next((python.parent.parent / "lib").glob("python*/site-packages")) / "torchaudio.py"
    if not empty.exists():
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"], check=True)
        empty.touch()
    return python.parent / "llamafactory-cli"


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name, cores = cpu[1] if cpu else platform.machine(), len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, {time.strftime('%Y-%m-%d')}"
