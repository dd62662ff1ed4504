"""Which records: folders, forms, lengths, splits; and how a conversation becomes tokens."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from jinja2 import TemplateError
from loguru import logger

from arguments.command_line import UserError
from arguments.records import (
    SUFFIXES,
    BadRecord,
    find_files,
    read_file,
    to_conversation,
    to_document,
    to_pair,
    to_prompt,
)


@dataclass
class DataArguments:
    """The records of a stage: a folder with any mixture of forms (data/README.md), or a hub data set."""

    train_file_dir: str | None = field(
        default=None, metadata={"help": "Folder of training records, searched recursively."}
    )
    validation_file_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of held-out records. Without it a share of the training records is held out."},
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub data set, instead of folders."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    validation_split_percentage: float = field(
        default=5,
        metadata={"help": "Held-out share without a validation folder, in percent (below 1: as a fraction)."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Take only that many training records."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Take only that many held-out records."})
    max_source_length: int = field(
        default=256, metadata={"help": "Tokens kept of the conversation up to the last answer."}
    )
    max_target_length: int = field(default=256, metadata={"help": "Tokens kept of the last answer; in RL, generated."})
    bad_records: str = field(
        default="error",
        metadata={"help": "error: stop and name them. skip: go on without them.", "choices": ["error", "skip"]},
    )
    overwrite_cache: bool = field(
        default=False, metadata={"help": "Tokenize anew (records are tokenized at every start)."}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenizing."})

    def __post_init__(self):
        if not (self.train_file_dir or self.dataset_name):
            raise UserError("--train_file_dir is missing: name the folder with the training records")
        for flag in ("max_source_length", "max_target_length"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} is {getattr(self, flag)}, expected at least 1")

    def load_documents(self) -> tuple[Dataset, Dataset]:
        """Training and held-out rows {"text"}."""
        return self._load(lambda record: {"text": to_document(record)})

    def load_conversations(self) -> tuple[Dataset, Dataset]:
        """Training and held-out rows {"messages"}, each ending with an answer."""
        return self._load(lambda record: {"messages": to_conversation(record)})

    def load_pairs(self) -> tuple[Dataset, Dataset]:
        """Training and held-out rows {"prompt": messages, "chosen", "rejected"}."""
        return self._load(to_pair)

    def load_prompts(self) -> tuple[Dataset, Dataset]:
        """Training and held-out rows {"prompt": messages, "record": the record as JSON, for reward functions}."""
        return self._load(lambda record: {"prompt": to_prompt(record), "record": json.dumps(record, default=str)})

    def encode(self, tokenizer, messages: list[dict]) -> dict[str, list[int]]:
        """Tokens of a conversation that ends with an answer.

        Returns input_ids and labels of equal length; labels are -100 except on assistant turns and on the token that
        ends each. Both stop with the last answer's end. What comes before the last answer is cut to max_source_length
        as encode_prompt does, the end of the answer beyond max_target_length is cut off.
        """
        while True:
            ids, labels, start = encode_turns(tokenizer, messages)
            if start <= self.max_source_length or not (shorter := without_oldest(messages)):
                break
            messages = shorter
        keep = slice(max(0, start - self.max_source_length), start + self.max_target_length)
        return {"input_ids": ids[keep], "labels": labels[keep]}

    def encode_prompt(self, tokenizer, messages: list[dict]) -> list[int]:
        """Tokens of a conversation that awaits an answer, at most max_source_length of them.

        Of a long one the oldest exchanges go first, the system text stays; then the start of what is left is cut.
        """
        while True:
            text = render(tokenizer, messages, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) <= self.max_source_length or not (shorter := without_oldest(messages)):
                return ids[-self.max_source_length :]
            messages = shorter

    def _load(self, form: Callable) -> tuple[Dataset, Dataset]:
        train = self._read(self.train_file_dir, "train", form)
        if self.validation_file_dir:
            held_out = self._read(self.validation_file_dir, "validation", form)
        else:
            share = self.validation_split_percentage
            share = share if share < 1 else share / 100
            random.Random(42).shuffle(train)
            count = max(1, round(share * len(train)))
            held_out, train = train[:count], train[count:]
        if not train:
            raise UserError(f"{self.train_file_dir or self.dataset_name}: no training records left")
        train, held_out = sample(train, self.max_train_samples), sample(held_out, self.max_eval_samples)
        logger.info(f"{len(train)} training and {len(held_out)} held-out records")
        return Dataset.from_list(train), Dataset.from_list(held_out)

    def _read(self, folder: str | None, split: str, form: Callable) -> list[dict]:
        rows, bad = [], []
        for place, record in self._records(folder, split):
            try:
                if isinstance(record, BadRecord):
                    raise record
                rows.append(form(record))
            except BadRecord as error:
                bad.append(f"{place}: {error}")
        if bad:
            shown = "\n  ".join(bad[:10]) + (f"\n  and {len(bad) - 10} more" if len(bad) > 10 else "")
            if self.bad_records == "error":
                raise UserError(f"{len(bad)} bad records (--bad_records skip goes on without them)\n  {shown}")
            logger.warning(f"Skipped {len(bad)} bad records\n  {shown}")
        return rows

    def _records(self, folder: str | None, split: str):
        if folder is None:
            try:
                dataset = load_dataset(self.dataset_name, self.dataset_config_name, split=split)
            except (OSError, ValueError) as error:
                raise UserError(f"--dataset_name {self.dataset_name}: {str(error).splitlines()[0]}") from error
            yield from ((f"{self.dataset_name}[{split}][{i}]", row) for i, row in enumerate(dataset))
            return
        if not Path(folder).exists():
            raise UserError(f"no such folder of records: {folder}")
        files = find_files(folder)
        if not files:
            raise UserError(f"{folder} holds no file that ends in {', '.join(SUFFIXES)}")
        for path in files:
            yield from read_file(path)


def sample(rows: list, count: int | None) -> list:
    """At most `count` rows, picked over all files alike (a folder's first rows are often of one file), in order."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(42).sample(range(len(rows)), count))]


def without_oldest(messages: list[dict]) -> list[dict] | None:
    """The conversation without its first question and answer; None when there is only one."""
    later = [i for i, message in enumerate(messages) if message["role"] == "user"][1:]
    system = messages[:1] if messages[0]["role"] == "system" else []
    return system + messages[later[0] :] if later else None


def render(tokenizer, messages: list[dict], **kwargs) -> str:
    """The chat template's text. A template that knows no system role gets it at the head of the first question."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except TemplateError as error:
        if messages[0]["role"] != "system" or len(messages) < 2:
            raise UserError(f"the chat template refuses a conversation: {error}") from error
        first = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        return render(tokenizer, [first, *messages[2:]], **kwargs)


def encode_turns(tokenizer, messages: list[dict]) -> tuple[list[int], list[int], int]:
    """input_ids and labels of a whole conversation (see DataArguments.encode), and where the last answer starts.

    The template is rendered with a marker in place of each answer, so that an answer is found by place and not by its
    words, whatever the template does around it.
    """
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    marker = "\ue000{}\ue001".format
    numbered = iter(range(len(answers)))
    marked = [m | {"content": marker(next(numbered))} if m["role"] == "assistant" else m for m in messages]
    rest, text, spans = render(tokenizer, marked), "", []
    for number, answer in enumerate(answers):
        before, found, rest = rest.partition(marker(number))
        if not found:
            raise UserError("the chat template leaves out or rewrites assistant turns: it cannot be trained on")
        spans.append((len(text + before), len(text + before + answer)))
        text += before + answer
    encoded = tokenizer(text + rest, add_special_tokens=False, return_offsets_mapping=True)
    return mask_answers(tokenizer, encoded["input_ids"], encoded["offset_mapping"], spans)


def mask_answers(tokenizer, ids, offsets, spans) -> tuple[list[int], list[int], int]:
    """Labels that are -100 outside the character `spans` and the special token that follows each.

    Everything after the last answer's end is cut off; where the template puts no special token there, eos is added. A
    token that begins before its span ("Assistant:" + " a") is the answer's. Returns where the last answer starts too.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    labels, position, answer = [-100] * len(ids), 0, 0
    for start, end in spans:
        while position < len(ids) and offsets[position][1] <= start:
            position += 1
        answer = position
        while position < len(ids) and offsets[position][0] < end:
            labels[position] = ids[position]
            position += 1
        closing = next((i for i in range(position, min(position + 2, len(ids))) if ids[i] in special), None)
        if closing is not None and tokenizer.decode(ids[position:closing]).strip() == "":
            labels[closing] = ids[closing]
            position = closing + 1
    if position and labels[position - 1] in special:
        return ids[:position], labels[:position], answer
    return ids[:position] + [tokenizer.eos_token_id], labels[:position] + [tokenizer.eos_token_id], answer
