"""Files of answers: what a line says of itself, and whether a call may go on behind those of an earlier one."""

import os
from pathlib import Path

from arguments.atomic import as_lines, read_lines
from arguments.command_line import UserError


def writable(flag: str, file: str) -> Path:
    """The file that `flag` names, checked before models work for hours on its content.

    Raises:
        UserError: when it cannot be written, nor made.
    """
    path = Path(file)
    there = next(above for above in (path, *path.absolute().parents) if above.exists())
    if path.is_dir() or not (there == path or there.is_dir()) or not os.access(there, os.W_OK):
        raise UserError(f"--{flag} {file} cannot be written: name a file, in a folder where this user may")
    return path


def question_of(messages: list[dict]) -> dict:
    """What a line of answers says of its question."""
    return {"Input": messages[-1]["content"]} | ({"Messages": messages} if len(messages) > 1 else {})


def fault_of(row: dict, messages: list[dict] | None, model: str, settings: dict) -> str | None:
    """Why a line of answers is not what this call would write; None if it is, or an older version left it unsaid."""
    if messages is None or row["Input"] != messages[-1]["content"]:
        return "to other questions"
    if "With" in row and row.get("Messages") != question_of(messages).get("Messages"):
        return "to these questions with another system text, or other turns before them"
    if Path(row.get("Model", model)).resolve() != Path(model).resolve():
        return f"of {row['Model']}, not of {model}"
    then = row.get("With", settings)
    unknown = {"weights"} - (then.keys() & settings.keys())
    changed = sorted(n for n in (then.keys() | settings.keys()) - unknown if then.get(n) != settings.get(n))
    names = ["other weights in that folder" if name == "weights" else f"another --{name}" for name in changed]
    return f"by {' and '.join(names)}" if names else None


def already_answered(path: Path, questions: list[list[dict]], model: str, settings: dict) -> int:
    """How many answers an earlier call left; they must be by this model, to the first of these questions.

    A last line that a kill or a full disk cut short does not count. Lines of older versions say less of themselves.
    """
    if not path.is_file():  # nor is a pipe, or /dev/stdout, read
        return 0
    try:
        rows = read_lines(path)
        following = [*questions, *[None] * len(rows)]  # a file may hold more answers than there are questions
        faults = [fault_of(row, asked, model, settings) for row, asked in zip(rows, following, strict=False)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is not of lines {{"Input", "Output"}}: name another --predictions_file') from error
    if fault := next(filter(None, faults), None):
        raise UserError(f"{path} holds answers {fault}: name another --predictions_file")
    return len(rows)


def refuse_to_replace(path: Path) -> None:
    """See that the file that --compare is to write holds nothing but what an earlier --compare left there.

    Raises:
        UserError: when it holds something else: the questions, or answers of one model.
    """
    try:
        compared = not path.is_file() or all(isinstance(row["Output"], dict) for row in read_lines(path))
    except (ValueError, KeyError, TypeError):
        compared = False
    if not compared:
        raise UserError(f"{path} holds something else than compared answers: name another --predictions_file")


def replace_lines(path: Path, rows: list[dict]) -> None:
    """Write a file of JSON lines anew, in its place: it may be a link, or /dev/null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(as_lines(rows))
