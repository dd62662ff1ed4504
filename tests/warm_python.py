"""A `python` with the libraries in memory, for tests that start many scripts: each is a fork, spared 6 s of imports.

    python tests/warm_python.py folder     makes folder/python, and serves what is started with it

Only scripts are forked, with their flags, folder, environment and streams; anything else is left to the real python.
Not as in a process of its own are its memory, its signals, and what python or a library reads as it starts: hash seed
(two ranks go through a set in the same order), LD_PRELOAD, MALLOC_..., OMP_NUM_THREADS, HF_....
"""

import json
import os
import random
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, socket, sys
words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]  # torchrun asks for no buffer
if not words or words[0].startswith("-"):
    os.execv(sys.executable, [sys.executable, *words])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b" "], [0, 1, 2])
    server.sendall(json.dumps([words, os.getcwd(), dict(os.environ)]).encode() + b"\\n")
    code = b"".join(iter(lambda: server.recv(8), b""))  # until it has ended; nothing: it was killed
    sys.exit(int(code or 1))
"""


def become(words: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Let this fork be as `python words` is when it starts."""
    import numpy

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    numpy.random.seed()
    named = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv, sys.path[:1] = words, [str(Path(words[0]).resolve().parent), *named]


def run(connection: socket.socket) -> None:
    """Run the script that a client names, and tell it the exit code."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    become(*json.loads(connection.makefile().readline()), streams)
    threading.Thread(target=lambda: connection.recv(1) or os._exit(1), daemon=True).start()  # the client was killed
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    finally:
        connection.send(str(code).encode())


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
    client, parent = Path(sys.argv[1]) / "python", os.getppid()
    server = socket.socket(socket.AF_UNIX)
    server.bind(address := f"{sys.argv[1]}/socket")
    server.listen()
    server.settimeout(10)
    client.with_suffix(".new").write_text(CLIENT.format(python=sys.executable, address=address))
    client.with_suffix(".new").chmod(0o755)
    client.with_suffix(".new").rename(client)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while os.getppid() == parent:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            return run(connection)
        connection.close()


if __name__ == "__main__":
    main()
