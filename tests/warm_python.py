"""A `python` with the libraries in memory, for tests that start many scripts: each is a fork, spared 6 s of imports.

    python tests/warm_python.py folder     makes folder/python, and serves what is started with it until it is killed

Only scripts are forked, with their flags, folder, environment and streams; anything else is left to the real python.
What belongs to a process from its start (LD_PRELOAD, its peak in memory, signals) is not that of a fork.
"""

import atexit
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]  # torchrun asks for no buffer
if not words or words[0].startswith("-"):
    os.execv(sys.executable, [sys.executable, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([words, os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(8) or 1))  # nothing: it was killed
"""


def run(words: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> int:
    """Be the process that `python words` would be; returns its exit code."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    named = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:1] = [str(Path(words[0]).resolve().parent), *named]
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def main():
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers
    import trl

    for name in ("AutoModelForCausalLM", "AutoTokenizer", "Trainer"):  # they import on demand
        getattr(transformers, name)
    trl.pack_dataset  # noqa: B018
    address = str(Path(sys.argv[1]) / "socket")
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()
    client = Path(sys.argv[1]) / "python"
    client.with_suffix(".new").write_text(CLIENT.format(python=sys.executable, address=address))
    client.with_suffix(".new").chmod(0o755)
    client.with_suffix(".new").rename(client)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            call = json.load(connection.makefile())
            connection.send(str(run(*call, streams)).encode())
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main()
