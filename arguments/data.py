"""Which records: folders, forms, splits, lengths; read and tokenized once, then kept as memory-mapped Arrow files."""

import inspect
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets, get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetsError
from loguru import logger

from arguments.atomic import append_lines
from arguments.command_line import UserError, expect, first_line, given, one_line
from arguments.encoding import LengthArguments, embedding_rows, encode_turns, judged
from arguments.files import SUFFIXES, find_files, other_files
from arguments.preview import preview
from arguments.rows import (
    FORMS,
    column,
    content_hash,
    file_rows,
    hash_of,
    hub_rows,
    is_bad,
    rows_of,
    token_lengths,
    tokenizer_key,
)

HELD_OUT = re.compile(r"/(validation|valid|val|dev|test|eval)(?![a-z])", re.IGNORECASE)  # as the hub names splits


@dataclass
class DataArguments(LengthArguments):
    """The records of a stage: folders with any mixture of forms (data/README.md), or a hub data set."""

    train_file_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of training records, searched recursively. Several: a,b:2 (those of b count twice in an "
            "epoch; b:0.5 takes about half of them)."
        },
    )
    validation_file_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of held-out records, or several: a,b. Without it a share of the training records is "
            "held out."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set, instead of folders."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    validation_split_percentage: float = field(
        default=5,
        metadata={"help": "Held-out share without a validation folder, in percent (below 1: as a fraction)."},
    )
    validation_split_count: int | None = field(
        default=None, metadata={"help": "Held-out records without a validation folder, instead of a share."}
    )
    keep_duplicates: bool = field(
        default=False,
        metadata={"help": "Keep training records that occur twice, or are held out as well."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Take only that many training records."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Take only that many held-out records."})
    bad_records: str = field(
        default="error",
        metadata={
            "help": "error: stop and name them. skip: go on, and list them in bad_records.jsonl in the output folder.",
            "choices": ["error", "skip"],
        },
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Read and tokenize again."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes for tokenizing. Default: all cores for 20,000 records and more."}
    )
    preview: int = field(
        default=0, metadata={"help": "Print that many records as the model will see them, and lengths; then stop."}
    )
    plan: bool = field(default=False, metadata={"help": "A flag of RunArguments that is of use here, too."})

    def __post_init__(self):
        if not (self.train_file_dir or self.dataset_name):
            raise UserError("--train_file_dir is missing: name the folder with the training records")
        if self.train_file_dir and self.dataset_name:
            raise UserError(
                f"--train_file_dir {self.train_file_dir} and --dataset_name {self.dataset_name} are two sources: give "
                "one (a downloaded data set is a folder like others, and folders may be joined by commas)"
            )
        self._bad_file = None  # where skipped records are listed
        self.facts = {}  # what the training data looked like, for data.json
        counts = "max_train_samples", "max_eval_samples", "validation_split_count", "preprocessing_num_workers"
        super().__post_init__()
        expect(self, "at least 1", lambda x: x >= 1, *counts)
        expect(self, "a number of records", lambda x: x >= 0, "preview")
        expect(self, "a share in percent", lambda x: 0 < x < 100, "validation_split_percentage")

    def load_documents(self, output_dir: str | None = None) -> tuple[Dataset, Dataset]:
        """Training and held-out rows {"text"}, each with its place. Skipped records are listed in output_dir."""
        return self._load("document", output_dir)

    def load_conversations(self, output_dir: str | None = None) -> tuple[Dataset, Dataset]:
        """Training and held-out rows {"messages"}, each ending with an answer."""
        return self._load("conversation", output_dir)

    def load_pairs(self, output_dir: str | None = None) -> tuple[Dataset, Dataset]:
        """Training and held-out rows {"prompt": messages, "chosen", "rejected", "kind"}."""
        return self._load("pair", output_dir)

    def load_prompts(self, output_dir: str | None = None) -> tuple[Dataset, Dataset]:
        """Training and held-out rows {"prompt": messages, "record": the record as JSON, for reward functions}."""
        return self._load("prompt", output_dir)

    def load_questions(self) -> list[list[dict]]:
        """All of train_file_dir as conversations that await an answer, in order; each line of a .txt is a question."""
        return self._all("question")["prompt"][:]

    def load_texts(self) -> list[str]:
        """All of train_file_dir as documents, in order."""
        return self._all("document")["text"][:]

    def check_records(self, form: str) -> None:
        """See that all records of train_file_dir can be used: those of its train/ and validation/, where it has them.

        Raises:
            UserError: when one cannot, unless bad ones are skipped.
        """
        for folder, _ in weighted_folders(self.train_file_dir):
            parts = [path for path in (Path(folder) / "train", Path(folder) / "validation") if path.is_dir()]
            for part in parts or [folder]:
                self._handle_bad(bad_rows(self._read(str(part), "train", form)))

    def _all(self, form: str) -> Dataset:
        rows = self._read(self.train_file_dir, "train", form)
        self._handle_bad(bad_rows(rows), hint="")  # who asks or judges leaves none out, and has no such flag
        return rows

    def tokenize(self, rows: Dataset, encode: Callable, tokenizer, keep: tuple[str, ...] = (), **settings) -> Dataset:
        """Every row as `encode` returns it, with its columns `keep`: in parallel, once per machine, cached on disk.

        A row that `encode` refuses (UserError) is a bad record. The cache is reused only for the same rows, tokenizer,
        template, code (of `encode`'s module and of what encodes conversations), lengths and `settings`.
        """
        code = [inspect.getsource(inspect.getmodule(made_by)) for made_by in (encode, encode_turns, DataArguments)]
        lengths = self.max_source_length, self.max_target_length
        kind = tokenizer_key(tokenizer), embedding_rows(tokenizer)
        key = hash_of(rows._fingerprint, code, kind, lengths, sorted(settings.items()))
        encoded = self._mapped(rows, judged(encode, rows, tokenizer), keep, key)
        refused = [rows[int(i)] | {"bad": encoded[int(i)]["bad"]} for i in np.flatnonzero(is_bad(encoded))]
        self._handle_bad([row | {"raw": json.dumps(row, ensure_ascii=False)} for row in refused])
        if refused:
            encoded = encoded.select(np.flatnonzero(~is_bad(encoded)))
        encoded = encoded.remove_columns("bad")
        self._report_cut_answers(encoded)
        if "tokens" not in self.facts:  # the training rows come first
            self.facts["tokens"] = token_lengths(encoded)
        return encoded

    def _mapped(self, rows: Dataset, function: Callable, keep: tuple[str, ...], key: str) -> Dataset:
        """Every row as `function` returns it, with its columns `keep`, made by a machine's first process for all."""
        fresh = self.overwrite_cache and PartialState().is_local_main_process
        with PartialState().local_main_process_first():
            return rows.map(
                function,
                remove_columns=[name for name in rows.column_names if name not in keep],
                num_proc=self.preprocessing_num_workers or (cores() if len(rows) >= 20_000 else None),
                new_fingerprint=key,
                load_from_cache_file=not fresh,
                desc="Tokenizing",
            )

    def _report_cut_answers(self, encoded: Dataset) -> None:
        """Log how many answers are longer than their limit: the model does not learn how those end."""
        names = {"target_tokens", "chosen_tokens", "rejected_tokens"} & set(encoded.column_names)
        lengths = np.array([encoded[name][:] for name in sorted(names)])
        if cut := int((lengths > self.max_target_length).sum()):
            logger.info(
                f"{cut} of {lengths.size} answers are longer than --max_target_length {self.max_target_length}: their "
                "ends are cut off and not trained"
            )

    def show(self, dataset: Dataset, tokenizer) -> None:
        """Print the first records as the model will see them, and what the length limits cut off."""
        print(preview(dataset, tokenizer, self.preview, self.max_source_length, self.max_target_length))

    def _load(self, form: str, output_dir: str | None) -> tuple[Dataset, Dataset]:
        sources, apart = weighted_folders(self.train_file_dir), self._held_out_apart()
        self._warn_of_unused(form, apart)
        held_sources = weighted_folders(self.validation_file_dir) if apart else []
        if any(weight != 1 for _, weight in held_sources):
            raise UserError(f"--validation_file_dir {self.validation_file_dir}: held-out records have no weights")
        warn_of_held_out([folder for folder, _ in sources], [folder for folder, _ in held_sources])
        refuse_output_among([folder for folder, _ in sources + held_sources], output_dir)
        read = [self._read(folder, "train", form) for folder, _ in sources]
        weights = np.repeat([weight for _, weight in sources], [len(rows) for rows in read])
        rows = joined(read)
        held_rows = joined([self._read(folder, "validation", form) for folder, _ in held_sources]) if apart else None
        if output_dir and not (self.preview or self.plan):
            self._bad_file = Path(output_dir) / "bad_records.jsonl"
            if PartialState().is_main_process:
                self._bad_file.unlink(missing_ok=True)  # an earlier run's
        bad = bad_rows(rows)
        self._handle_bad(bad + (bad_rows(held_rows) if held_rows else []))
        self.facts = {"read": len(rows), "bad": len(bad), "duplicates": 0, "held_out_too": 0}

        train, keys = np.flatnonzero(~is_bad(rows)), column(rows, "key")
        held = np.flatnonzero(~is_bad(held_rows)) if held_rows else np.array([], dtype=int)
        if not self.keep_duplicates:
            train = self._without_duplicates(train, keys, column(held_rows, "key")[held] if held_rows else held)
        if held_rows is None:
            train, held = self._hold_out(train, column(rows, "question")[train])
            held_rows = rows
        train, held = sample(repeated(train, weights), self.max_train_samples), sample(held, self.max_eval_samples)
        for which, found in (("training", train), ("held-out", held)):
            if not len(found):
                raise UserError(f"{self.train_file_dir or self.dataset_name}: no {which} records left")
        self.facts |= {"training": len(train), "held_out": len(held)}
        logger.info(f"{len(train)} training and {len(held)} held-out records")
        columns = [*FORMS[form][0], "place"]
        return rows.select(train).select_columns(columns), held_rows.select(held).select_columns(columns)

    def _warn_of_unused(self, form: str, apart: bool) -> None:
        """Name the flags that were given and change nothing."""
        unused = {"dataset_config_name": "without --dataset_name"} if not self.dataset_name else {}
        if apart:
            held_out = "with held-out records of their own"
            unused |= {"validation_split_percentage": held_out, "validation_split_count": held_out}
        if form == "document":
            unused |= dict.fromkeys(("max_source_length", "max_target_length"), "in PT: see --block_size")
        for flag in given(self, unused):
            logger.warning(f"--{flag} has no effect {unused[flag]}")

    def _held_out_apart(self) -> bool:
        """Whether held-out records have a folder or split of their own; the 2023 scripts named one folder for both."""
        if self.dataset_name and not self.validation_file_dir:
            return "validation" in self._hub(get_dataset_split_names)
        folders = [folder and os.path.realpath(folder) for folder in (self.train_file_dir, self.validation_file_dir)]
        twice = folders[1] and folders[0] == folders[1]
        if twice and not self.keep_duplicates:
            logger.info("The validation folder is the training folder: holding out a share of it")
            return False
        return bool(self.validation_file_dir)

    def _without_duplicates(self, train: np.ndarray, keys: np.ndarray, held_keys: np.ndarray) -> np.ndarray:
        """The training rows without repetitions, and without those that are held out too."""
        _, first = np.unique(keys[train], return_index=True)
        once = train[np.sort(first)]
        kept = once[~np.isin(keys[once], held_keys)]
        twice, shared = len(train) - len(once), len(once) - len(kept)
        self.facts |= {"duplicates": twice, "held_out_too": shared}
        if twice or shared:
            logger.warning(
                f"Left out of training: {twice} duplicates and {shared} records that are held out too "
                "(--keep_duplicates keeps them)"
            )
        return kept

    def _hold_out(self, train: np.ndarray, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The training rows without a fixed random share, and that share; both in order.

        Pairs on one question stay together, so the share may be larger by some: they often have an answer in common,
        and a reward model that has seen it in training is not judged on something new.
        """
        share = self.validation_split_percentage
        share = share if share < 1 else share / 100
        count = self.validation_split_count or max(1, round(share * len(train)))
        if count >= len(train):
            raise UserError(f"{count} held-out records asked for, but there are {len(train)} in all")
        _, question, sizes = np.unique(questions, return_inverse=True, return_counts=True)
        order = np.random.RandomState(42).permutation(len(sizes))
        picked = np.isin(question, order[: np.searchsorted(sizes[order].cumsum(), count) + 1])
        if picked.all():
            raise UserError(
                f"{count} held-out records asked for, but all {len(train)} are on {len(sizes)} question(s) or texts, "
                "which are held out whole: name a --validation_file_dir, or ask for fewer"
            )
        return train[~picked], train[picked]

    def _handle_bad(self, bad: list[dict], hint: str = " (--bad_records skip goes on without them)") -> None:
        """Stop at bad records {"place", "bad": reason, "raw"}, or list them in the output folder and go on."""
        bad = list({(row["place"], row["raw"]): row for row in bad}.values())  # a weight may have repeated some
        if not bad:
            return
        lines = [f"{row['place']}: {row['bad']}" for row in examples(bad)]
        shown = "\n  ".join(lines) + (f"\n  and {len(bad) - 10} more" if len(bad) > 10 else "")
        if self.bad_records == "error":
            raise UserError(f"{len(bad)} bad records{hint}\n  {shown}")
        logger.warning(f"Skipped {len(bad)} bad records\n  {shown}")
        if self._bad_file and PartialState().is_main_process:
            found = [{"place": row["place"], "reason": row["bad"], "record": row["raw"]} for row in bad]
            append_lines(self._bad_file, found)

    def _hub(self, function: Callable, **kwargs):
        """Call a function of datasets for the hub data set."""
        try:
            return function(self.dataset_name, self.dataset_config_name, **kwargs)
        except DatasetGenerationError as error:  # the reason is in its cause
            raise UserError(
                f"--dataset_name {self.dataset_name}: its files disagree or are broken "
                f"({one_line(error.__cause__ or error)}). Download them and name their folder as --train_file_dir: "
                "that reads each record by itself"
            ) from error
        except (OSError, ValueError, DatasetsError) as error:
            raise UserError(f"--dataset_name {self.dataset_name}: {first_line(error)}") from error

    def _read(self, folder: str | None, split: str, form: str) -> Dataset:
        """All records of a folder, or of the hub data set, as rows of `form`; bad ones are marked."""
        if folder is None:
            hub = self._hub(load_dataset, split=split)
            source = {"hub": hub, "name": f"{self.dataset_name}[{split}]"}
            return rows_of(form, hub_rows, source, hub._fingerprint, fresh=self.overwrite_cache)
        if not Path(folder).exists():
            raise UserError(f"no such folder of records: {folder}")
        paths = find_files(folder)
        if not paths:
            raise UserError(f"{folder} holds no file that ends in {', '.join(SUFFIXES)}")
        if others := other_files(folder):
            named = ", ".join(str(path) for path in others[:5]) + (" ..." if len(others) > 5 else "")
            why = "for their names end in no known way, or they link to nothing"
            logger.warning(f"{len(others)} files are not read, {why}: {named}")
        if form == "document" and (texts := [path.name for path in paths if ".txt" in path.suffixes]):
            more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
            logger.info(
                f"{texts[0]}{more}: each line, in hard-wrapped text each paragraph, is a document of its own; longer "
                'ones go into a .jsonl, one {"text"} each'
            )
        source = {"paths": [str(path) for path in paths]}
        contents = [(str(path), content_hash(path)) for path in paths]
        try:
            return rows_of(form, file_rows, source, contents, fresh=self.overwrite_cache)
        except ValueError:  # datasets raises it when there are no rows at all
            if next(file_rows(form, **source), None) is None:
                raise UserError(
                    f"{folder} holds no records: its {len(paths)} file(s) are empty, or a .csv of column names alone"
                ) from None
            raise


def cores() -> int:
    """Those that this process may use: a batch system gives it some of a machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def refuse_output_among(folders: list[str | None], output_dir: str | None) -> None:
    """See that the run does not write into a folder of records, which it would read when it is started again."""
    output = Path(output_dir or "").resolve()
    for folder in filter(None, folders) if output_dir else ():
        if Path(folder).is_dir() and Path(folder).resolve() in (output, *output.parents):
            raise UserError(
                f"--output_dir {output_dir} lies in {folder}, all of whose files are read as records: name a folder "
                "beside it"
            )


def joined(parts: list[Dataset]) -> Dataset:
    """The rows of all parts, under a fingerprint that is the same in each run and rank: tokens are cached by it.

    datasets makes it of the parts' features too, which differ between rows just made and the same from the cache.
    """
    rows = concatenate_datasets(parts)
    rows._fingerprint = hash_of([part._fingerprint for part in parts])
    return rows


def warn_of_held_out(sources: list[str | None], held_sources: list[str | None]) -> None:
    """Warn of files that are trained on although their names, or their folders', are those of held-out records."""
    apart = {path.resolve() for folder in filter(None, held_sources) for path in find_files(folder)}
    for folder in filter(None, sources):
        files = [path for path in find_files(folder) if HELD_OUT.search(f"/{os.path.relpath(path, folder)}")]
        if named := [str(path) for path in files if path.resolve() not in apart]:
            logger.warning(
                f"{len(named)} files are trained on whose names are those of held-out records: {named[0]} ... If that "
                "is not meant, name the folders apart, as --train_file_dir and --validation_file_dir"
            )


def examples(bad: list[dict], most: int = 10) -> list[dict]:
    """Some bad records in order: three of each file in turn, for a file full of them would hide the others."""
    seen, turns = Counter(), []
    for row in bad:
        file = row["place"].rpartition(":")[0]
        turns.append(seen[file] // 3)
        seen[file] += 1
    return [bad[i] for i in sorted(sorted(range(len(bad)), key=turns.__getitem__)[:most])]


def bad_rows(rows: Dataset) -> list[dict]:
    return list(rows.select(np.flatnonzero(is_bad(rows))))


def weighted_folders(folders: str | None) -> list[tuple[str | None, float]]:
    """'a,b:2' as [("a", 1.0), ("b", 2.0)]; a path that exists as it stands is one folder; none, a hub data set."""
    if not folders:  # '' is what a run script passes on for no folder
        return [(None, 1.0)]
    found, parts = [], [part for part in folders.split(",") if part.strip()]
    if not parts:
        raise UserError(f"{folders!r} names no folder of records")
    for part in [folders] if Path(folders).exists() else parts:
        name, colon, weight = part.rpartition(":")
        try:
            found.append((name, float(weight)) if colon and not Path(part).exists() else (part, 1.0))
        except ValueError:
            raise UserError(f"{part}: expected a folder, or folder:weight with a number") from None
        if not 0 < found[-1][1] < math.inf:  # also refuses NaN
            raise UserError(f"{part}: the weight is {weight}, expected a number above 0: how often its records count")
    return found


def repeated(indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Each index as often as its row's weight; for a weight's fraction a fixed random choice of rows gets one more."""
    whole, fraction = np.divmod(weights[indices], 1)
    return np.repeat(indices, whole.astype(int) + (np.random.RandomState(42).rand(len(indices)) < fraction))


def sample(indices: np.ndarray, count: int | None) -> np.ndarray:
    """At most `count` rows in order, drawn from all files (a folder's first rows are often from one file)."""
    if count is None or count >= len(indices):
        return indices
    return indices[sorted(random.Random(42).sample(range(len(indices)), count))]
