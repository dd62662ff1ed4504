"""Files that are whole or as they were before, wherever a kill or a full disk falls."""

import json
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path`, then put it in its place in one step."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)


def read_whole(path: Path):
    """What a JSON file holds; None where there is none, or one that was cut short."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: no JSON, or no UTF-8
        return None


def drop_cut(path: Path) -> None:
    """Remove a JSON file that was cut short: a library wrote it in place, and would fail to read it."""
    if read_whole(path) is None:
        path.unlink(missing_ok=True)
