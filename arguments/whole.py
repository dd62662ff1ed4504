"""Files that are whole or as they were before, wherever a kill or a full disk falls."""

import json
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path`, then put it in its place in one step."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, "utf-8")
    os.replace(aside, path)


def drop_cut(path: Path) -> None:
    """Remove a JSON file that was cut short: a library wrote it in place, and would fail to read it."""
    try:
        json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return
    except ValueError:  # JSON or UTF-8
        path.unlink(missing_ok=True)
