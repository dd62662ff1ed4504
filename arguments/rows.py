"""Records as rows of a memory-mapped Arrow file, cached on each machine under a hash of what they are made from."""

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features, Value

from arguments import files, records
from arguments.files import BadRecord, read_file
from arguments.records import to_conversation, to_document, to_pair, to_prompt, to_question

TEXT, MESSAGES = Value("string"), [{"role": Value("string"), "content": Value("string")}]
# form: the columns of its rows, and how a record becomes one
FORMS = {
    "document": ({"text": TEXT}, lambda record: {"text": to_document(record)}),
    "conversation": ({"messages": MESSAGES}, lambda record: {"messages": to_conversation(record)}),
    "pair": (
        {"prompt": MESSAGES, "chosen": TEXT, "rejected": TEXT, "kind": TEXT},
        lambda record: to_pair(record) | {"kind": storable(str(record.get("kind") or ""))},
    ),
    "prompt": (
        {"prompt": MESSAGES, "record": TEXT},
        lambda record: {"prompt": to_prompt(record), "record": json.dumps(record, default=str)},
    ),
    "question": ({"prompt": MESSAGES}, lambda record: {"prompt": to_question(record)}),
}
# Columns beside those of the form: a row's place, a hash to find duplicates by, one that pairs on the same question
# share, and of a bad row the reason and record
BESIDE = {"place": TEXT, "key": Value("int64"), "question": Value("int64"), "bad": TEXT, "raw": TEXT}


def rows_of(form: str, generator: Callable, source: dict, *key, fresh: bool = False) -> Dataset:
    """All records of a source as rows of `form`, with the columns of BESIDE."""
    columns = Features(FORMS[form][0] | BESIDE)
    return cached(generator, source | {"form": form}, columns, form, *key, fresh=fresh)


def cached(generator: Callable, kwargs: dict, columns: Features | None, *key, fresh: bool = False) -> Dataset:
    """The rows that generator(**kwargs) yields, from the cache unless `fresh`.

    The cache key is `key` and the code that reads and makes them; kwargs do not count.
    """
    code = [inspect.getsource(module) for module in (files, records, inspect.getmodule(generator))]
    name = hash_of(generator.__name__, code, *key)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rows" / name
    with PartialState().local_main_process_first():
        if fresh and PartialState().is_local_main_process:
            shutil.rmtree(folder, ignore_errors=True)
        return Dataset.from_generator(generator, columns, cache_dir=str(folder), gen_kwargs=kwargs, fingerprint=name)


def file_rows(form: str, paths: list[str]) -> Iterator[dict]:
    for path in paths:
        for place, record in read_file(Path(path), by_line=form == "question"):
            yield to_row(form, place, record)


def hub_rows(form: str, hub: Dataset, name: str) -> Iterator[dict]:
    for number, record in enumerate(hub):
        yield to_row(form, f"{name}[{number}]", record)


def to_row(form: str, place: str, record) -> dict:
    """A record as a row, with the columns of BESIDE; a bad record has nothing else."""
    columns, convert = FORMS[form]
    try:
        if isinstance(record, BadRecord):
            raise record
        row = convert(record)
        same = json.dumps({name: row[name] for name in columns if name not in ("record", "kind")}, sort_keys=True)
        if "\\ud" in same:
            refuse_surrogates(row)
    except BadRecord as error:
        raw = record.raw if isinstance(record, BadRecord) else json.dumps(record, ensure_ascii=False, default=str)
        empty = {name: [] if kind is MESSAGES else "" for name, kind in columns.items()}
        of_bad = {"key": 0, "question": 0, "bad": storable(str(error)), "raw": storable(raw)}
        return empty | {"place": storable(place)} | of_bad
    key = number_of(same)
    question = number_of(json.dumps(row["prompt"])) if form == "pair" else key
    return row | {"place": storable(place), "key": key, "question": question, "bad": "", "raw": ""}


def number_of(text: str) -> int:
    """Hash of a text as an int64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def refuse_surrogates(row: dict) -> None:
    """Refuse half of a surrogate pair, which JSON escapes can hold but no encoding can store."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):x}"
        before = error.object[max(0, error.start - 20) : error.start]
        raise BadRecord(f"half of a character ({half}, the other half is missing) behind {before!r}") from None


def storable(text: str) -> str:
    """The text with lone surrogates escaped."""
    return text.encode(errors="backslashreplace").decode()


def column(rows: Dataset, name: str) -> np.ndarray:
    return rows.data.column(name).to_numpy()


def is_bad(rows: Dataset) -> np.ndarray:
    return column(rows, "bad") != ""


def hash_of(*parts) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def content_hash(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def tokenizer_key(tokenizer) -> str:
    """Hash of all that a tokenizer saves: vocabulary, settings, chat template."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return hash_of([content_hash(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()])


def id_columns(rows: Dataset) -> list[str]:
    """Names of the columns that hold token ids."""
    return [name for name in rows.column_names if name.endswith("_ids") and name != "position_ids"]


def token_lengths(rows: Dataset) -> dict:
    """How many tokens the rows have: {"total", "median", "longest", "counts" [20], "edges" [21]} (a histogram)."""
    names = id_columns(rows)
    batches = rows.select_columns(names).with_format("arrow").iter(batch_size=10_000)
    lengths = np.concatenate([pc.list_value_length(batch[name]).to_numpy() for batch in batches for name in names])
    counts, edges = np.histogram(lengths, bins=20)
    found = {"total": int(lengths.sum()), "median": int(np.median(lengths)), "longest": int(lengths.max())}
    return found | {"counts": counts.tolist(), "edges": edges.tolist()}
