"""Writing files atomically: a kill or a full disk leaves the old file or the new one, never half of it."""

import json
import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a file beside `path`, then rename it to `path`."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)


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
