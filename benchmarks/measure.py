"""What the benchmarks share: one command in a process of its own, measured, and the name of the machine."""

import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def measure(command: list, environment: dict) -> tuple[float, float, str]:
    """Seconds, peak resident memory (GiB) and printed text of a command that must succeed; run from the root."""
    with tempfile.TemporaryFile("w+") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        file.seek(0)
        printed = file.read()
    if status:
        raise SystemExit(f"{command[1]} failed:\n{printed[-3000:]}")
    return seconds, usage.ru_maxrss / 2**20, printed


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name, cores = cpu[1] if cpu else platform.machine(), len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, {time.strftime('%Y-%m-%d')}"
