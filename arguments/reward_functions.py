"""Rewards from the user's own Python functions, called as trl calls them."""

import asyncio
import copy
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from arguments.command_line import UserError


def load_functions(source: str) -> dict[str, Callable]:
    """The functions of --reward_functions, path/to/file.py:name[,name...], by name.

    Raises:
        UserError: when the file or a function in it is missing.
    """
    path, _, names = source.rpartition(":")
    if not Path(path).is_file() or not names:
        raise UserError(f"--reward_functions {source}: expected path/to/file.py:name[,name...]")
    spec = importlib.util.spec_from_file_location(path, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path] = module  # dataclasses look there
    sys.path.append(str(Path(path).resolve().parent))  # for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code: say which file, and what it said
        raise UserError(f"--reward_functions: {path} raised {type(error).__name__}: {error}") from error
    functions = {name.strip(): getattr(module, name.strip(), None) for name in names.split(",")}
    missing = [name for name, function in functions.items() if not callable(function)]
    if missing:
        raise UserError(f"--reward_functions: {path} has no function {', '.join(missing)}")
    return functions


def recorders(answers: list[dict], metrics: list[dict[str, float]]) -> dict[str, Callable]:
    """What trl gives reward functions to log with: log_extra(column, values) and log_metric(name, value).

    Columns are written beside the answers shown at each evaluation, metrics logged with those of the rollout.
    """

    def log_extra(column: str, values: list) -> None:
        if len(values) != len(answers):
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {len(answers)} completions")
        for answer, value in zip(answers, values, strict=True):
            answer.setdefault("extra", {})[column] = value.tolist() if hasattr(value, "tolist") else value  # a tensor

    def log_metric(name: str, value: float) -> None:
        metrics.extend([{name: float(value)}] * len(answers))  # ranks may have more and fewer

    return {"log_extra": log_extra, "log_metric": log_metric}


def function_scores(name: str, function, columns: dict) -> list[float]:
    """The numbers that a reward function, async or not, returns; None counts as 0.

    It gets copies of the lists among its columns: what it does to them reaches neither the training nor another one.
    """
    given = {key: copy.deepcopy(value) if isinstance(value, list) else value for key, value in columns.items()}
    try:
        values = function(**given)
        values = asyncio.run(values) if inspect.iscoroutine(values) else values
        values = [0.0 if value is None else float(value) for value in values]
    except Exception as error:  # it is the user's code: say which function and line, and what it said
        file = getattr(function, "__globals__", {}).get("__file__")
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        where = f" ({file}, line {lines[-1]})" if lines else ""
        raise UserError(f"reward function {name}{where} raised {type(error).__name__}: {error}") from error
    if len(values) != len(columns["completions"]):
        raise UserError(
            f"reward function {name} returned {len(values)} numbers for {len(columns['completions'])} completions"
        )
    return values
