"""What the model will see: records with their trained tokens marked, lengths, and what the limits cut. Plain text."""

import sys
from itertools import groupby

import numpy as np
from datasets import Dataset

from arguments.rows import id_columns

LIMITS = (64, 128, 256, 512, 1024, 2048, 4096)
BAR = 40


def preview(dataset: Dataset, tokenizer, count: int, max_source_length: int, max_target_length: int) -> str:
    """The first `count` rows, the share of trained and cut tokens, a histogram of lengths, a table of other limits.

    Rows hold token ids in columns that end in _ids, with "labels" where tokens are trained; columns that end in
    _tokens hold lengths before any cut, and source_kept what max_source_length leaves of source_tokens.
    """
    names = id_columns(dataset)
    first = dataset.select(range(min(count, len(dataset))))
    parts = [shown(row, names, number, tokenizer) for number, row in enumerate(first, 1)]
    lengths = np.concatenate([row_lengths(dataset, name) for name in names])
    parts.append(f"{len(dataset):,} records, {lengths.sum():,} tokens" + trained_share(dataset, lengths))
    parts.append(histogram(lengths))
    for name in (name for name in dataset.column_names if name.endswith("_tokens")):
        source = name == "source_tokens"
        flag, limit = ("max_source_length", max_source_length) if source else ("max_target_length", max_target_length)
        kept = np.array(dataset["source_kept"]) if source else None
        parts.append(limits_table(name, np.array(dataset[name]), flag, limit, kept))
    return "\n\n".join(parts)


def shown(row: dict, names: list[str], number: int, tokenizer) -> str:
    """A row's texts, trained tokens in brackets, green on a terminal."""
    before, after = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    parts = []
    for name in names:
        ids, labels = row[name], row.get("labels") or [-100] * len(row[name])
        padding = row["attention_mask"].count(0) if "attention_mask" in row else 0
        pairs = list(zip(ids, labels, strict=True))[: len(ids) - padding]
        text = ""
        for trained, run in groupby(pairs, key=lambda pair: pair[1] != -100):
            piece = tokenizer.decode([token for token, _ in run])
            text += before + piece + after if trained else piece
        trained = f", {sum(label != -100 for label in labels)} trained" if "labels" in row else ""
        padded = f", {padding} of padding behind them" if padding else ""
        parts.append(f"--- record {number}, {name}: {len(pairs)} tokens{trained}{padded}\n{text}")
    return "\n".join(parts)


def row_lengths(dataset: Dataset, name: str) -> np.ndarray:
    mask = "attention_mask" if "attention_mask" in dataset.column_names else None
    return np.array([sum(row[mask]) if mask else len(row[name]) for row in dataset.select_columns([mask or name])])


def trained_share(dataset: Dataset, lengths: np.ndarray) -> str:
    if "labels" not in dataset.column_names:
        return ""
    trained = sum(sum(label != -100 for label in row["labels"]) for row in dataset.select_columns(["labels"]))
    return f", {trained / lengths.sum():.1%} of them trained"


def histogram(lengths: np.ndarray) -> str:
    """Records by length, at most ten bins."""
    counts, edges = np.histogram(lengths, bins=min(10, int(np.ptp(lengths)) + 1))
    edges = np.ceil(edges).astype(int)
    width = len(f"{edges[-1]}")
    lines = [
        f"{low:>{width}} - {high:>{width}}  {'#' * round(BAR * n / counts.max())} {n}"
        for n, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
    return "tokens, records\n" + "\n".join(lines)


def limits_table(name: str, lengths: np.ndarray, flag: str, now: int, kept: np.ndarray | None = None) -> str:
    """How many records and tokens a limit cuts: the one that is set, and others.

    Whole exchanges go, so more is lost than what exceeds the limit. With `kept` (tokens that `now` leaves) the loss is
    exact for `now`, and a lower bound for the others.
    """
    lines = [
        f"{name}: {lengths.mean():.0f} on average, {lengths.max()} at most\n{flag:>18}  records cut     tokens lost"
    ]
    total = max(lengths.sum(), 1)
    for limit in sorted({*LIMITS, now}):
        over = np.maximum(lengths - limit, 0)
        lost, least = over.sum() / total, "at least " if kept is not None and limit != now and over.any() else ""
        if kept is not None and limit == now:
            lost = (lengths - kept).sum() / total
        here = "  <- now" if limit == now else ""
        lines.append(f"{limit:>18}  {(over > 0).mean():>11.1%}  {least + format(lost, '.1%'):>14}{here}")
        if limit >= max(now, lengths.max()):
            break
    return "\n".join(lines)
