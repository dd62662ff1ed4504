"""Two hosts: network namespaces joined by a veth pair, each with an address and a loopback of its own, one disk.

Needs root and `ip`; skipped where namespaces cannot be made.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ADAPTER, ROOT, SHORT, results
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
HOSTS = {"0": f"host-a-{os.getpid()}", "1": f"host-b-{os.getpid()}"}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts():
    """The commands that run something on host 0 and on host 1, whose addresses are 10.99.0.1 and .2."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and ip")
    first, second = HOSTS.values()
    try:
        for name in (first, second):
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    for number, name in enumerate((first, second), 1):
        ip("-n", name, "addr", "add", f"10.99.0.{number}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
    yield {rank: ["ip", "netns", "exec", name] for rank, name in HOSTS.items()}
    for name in (first, second):
        ip("netns", "del", name)


def command(tiny, records, output: Path, rows: int, *flags: str) -> tuple[list[str], dict[str, str]]:
    """run_sft.sh with `rows` rows a process and step; the environment for it."""
    words = [*map(str, SHORT["sft"]), "--validation_file_dir", str(records / "sft"), "--keep_duplicates"]
    words += ["--precision", "fp32", "--per_device_train_batch_size", str(rows), "--max_eval_samples", "4", *flags]
    environment = {"MODEL": tiny("llama"), "TRAIN": str(records / "sft"), "PYTHON": sys.executable}
    environment |= {"OUTPUT": str(output), "MERGED": f"{output}-merged", "OMP_NUM_THREADS": "1"}
    return ["bash", "scripts/run_sft.sh", *words], os.environ | environment


def start(hosts, words: list[str], environment: dict[str, str]) -> list[subprocess.Popen]:
    """The same command on both hosts, each in a process group that can be killed."""
    shared = {"NNODES": "2", "MASTER_ADDR": "10.99.0.1", "GLOO_SOCKET_IFNAME": "eth0"}
    return [
        subprocess.Popen(
            [*on_host, *words],
            cwd=ROOT,
            env=environment | shared | {"NODE_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for rank, on_host in hosts.items()
    ]


def ended(nodes: list[subprocess.Popen]) -> list[str]:
    errors = [node.communicate(timeout=300)[1].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    return errors


def test_two_hosts_train_as_one_process(hosts, tiny, records, tmp_path):
    words, environment = command(tiny, records, tmp_path / "one", 4)
    subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
    ended(start(hosts, *command(tiny, records, tmp_path / "two", 2)))
    one, two = load_file(tmp_path / "one" / ADAPTER), load_file(tmp_path / "two" / ADAPTER)
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
    assert results(tmp_path / "two")["eval_loss"] == pytest.approx(results(tmp_path / "one")["eval_loss"], rel=1e-4)


def test_a_host_that_dies_is_started_again(hosts, tiny, records, tmp_path):
    """kill -9 of all that runs on one host; the other one ends by itself, and the same commands go on."""
    flags = ("--max_steps", "200", "--save_steps", "5", "--save_total_limit", "2", "--logging_steps", "50")
    ended(start(hosts, *command(tiny, records, tmp_path / "whole", 2, *flags)))
    nodes = start(hosts, *command(tiny, records, tmp_path / "broken", 2, *flags))
    while not list((tmp_path / "broken").glob("checkpoint-*/seal.json")):
        assert nodes[0].poll() is None and nodes[1].poll() is None
        time.sleep(0.01)
    for pid in subprocess.run(["ip", "netns", "pids", HOSTS["1"]], capture_output=True, text=True).stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    assert nodes[1].wait() and nodes[0].wait(timeout=120), "the host that was left must not go on alone"
    assert not (tmp_path / "broken" / ADAPTER).exists()
    errors = ended(start(hosts, *command(tiny, records, tmp_path / "broken", 2, *flags)))
    assert "Going on from" in errors[0]
    whole, broken = load_file(tmp_path / "whole" / ADAPTER), load_file(tmp_path / "broken" / ADAPTER)
    assert max((whole[name] - broken[name]).abs().max().item() for name in whole) == 0.0
