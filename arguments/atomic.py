"""Writing files atomically: a kill or a full disk leaves the old file or the new one, and no two runs mix theirs."""

import fcntl
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

PATIENCE = 15  # seconds for which a run that was told to stop, or its loaders' processes, may still hold a folder
HELD: list[int] = []  # descriptor of the folder or file that this process writes into, if any


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a file beside `path`, then rename it to `path`."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)


def append_lines(path: Path, rows: Iterable[dict]) -> None:
    """Add rows to a file of JSON lines, behind its last whole line: a kill or a full disk may have cut one short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    added = as_lines(rows)
    regular = path.is_file() or not path.exists()
    with path.open("ab+" if regular else "wb") as file:
        if regular and (end := file.tell()):
            file.seek(end - 1)
            if file.read() != b"\n":
                file.seek(0)
                last = file.read().rpartition(b"\n")[2]
                if is_json(last):  # whole, but for the line's end: written by hand
                    added = b"\n" + added
                else:
                    file.truncate(end - len(last))
        file.write(added)


def append_step(path: Path, rows: list[dict]) -> None:
    """Add the rows of one evaluation, {"step", ...}, behind those of earlier steps, which alone are kept.

    Rows of this step or a later one are of a run that was killed after they were written, or of weights that were not
    kept.
    """
    earlier = [row for row in read_lines(path) if row["step"] < rows[0]["step"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, as_lines([*earlier, *rows]).decode())


def as_lines(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()


def is_json(text: bytes | str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_lines(path: Path) -> list:
    """What a file of JSON lines holds, without a last one that was cut short; [] if there is no file.

    Raises:
        ValueError: for another line that is not JSON, with its place.
    """
    *lines, last = (path.read_bytes() if path.exists() else b"").split(b"\n")
    numbered = [(number, line) for number, line in enumerate([*lines, *[last] * is_json(last)], 1) if line]
    if broken := [number for number, line in numbered if not is_json(line)]:
        raise ValueError(f"{path}:{broken[0]} is not JSON: mend that line, or delete it")
    return [json.loads(line) for _, line in numbered]


def read_json(path: Path):
    """What a JSON file holds; None if it is missing or was cut short."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: not JSON, or not UTF-8
        return None


def drop_if_cut(path: Path) -> None:
    """Remove a JSON file that was cut short: libraries write it in place, and would fail to read it."""
    if read_json(path) is None:
        path.unlink(missing_ok=True)


def drop_if_no_text(path: Path) -> None:
    """Remove a text that was cut inside a character: peft would fail to read it."""
    try:
        path.read_text("utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        path.unlink(missing_ok=True)


def hold_folder(folder: Path) -> bool:
    """Keep other runs from writing into `folder` until release, or the end of this process.

    Returns whether it could: False when another run is still there after PATIENCE seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return hold(folder, os.O_RDONLY)


def hold_file(path: Path) -> bool:
    """hold_folder for one file, which is made if there is none; anybody may write into a pipe."""
    if path.exists() and not path.is_file():
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    return hold(path, os.O_RDWR | os.O_CREAT)


def hold(path: Path, mode: int) -> bool:
    release()
    HELD.append(os.open(path, mode, 0o666))
    return lock(HELD[0])


def lock(descriptor: int) -> bool:
    """Lock an open file or folder until its last descriptor is closed; False after PATIENCE seconds."""
    started = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() - started > PATIENCE:
                return False
            time.sleep(0.5)
        except OSError:  # a network's file system may lock no folders
            return True


def release() -> None:
    """Let other runs write into what this process held, if anything."""
    while HELD:
        os.close(HELD.pop())
