"""How a conversation becomes tokens, how many, and which of them are trained: by a tokenizer and its template."""

import math
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial

import numpy as np
from datasets import Dataset
from jinja2 import TemplateError
from loguru import logger

from arguments.command_line import UserError, expect

EMPTY_THOUGHTS = re.compile(r"<think>\s*</think>\s*$")
NO_THOUGHTS = "\n</think>\n\n"  # behind <think>
OPENING = re.compile(r"^\s*<think>\s*")
MARKER = "\ue000{}\ue001"  # in place of an answer, in a template


@dataclass
class LengthArguments:
    """How much of a conversation is kept, in tokens."""

    max_source_length: int = field(
        default=256, kw_only=True, metadata={"help": "Tokens kept of the conversation up to the last answer."}
    )
    max_target_length: int = field(
        default=256, kw_only=True, metadata={"help": "Tokens kept of the last answer; in RL, generated."}
    )

    def __post_init__(self):
        expect(self, "at least 1", lambda x: x >= 1, "max_source_length", "max_target_length")

    @property
    def longest(self) -> int:
        """Tokens of the longest row that the lengths allow."""
        return self.max_source_length + self.max_target_length

    def encode(self, tokenizer, messages: list[dict]) -> dict[str, list[int]]:
        """Tokens of a conversation that ends with an answer.

        Returns input_ids and labels of equal length; labels are -100 except on assistant turns and on the token that
        ends each. Both stop at the last answer's end. What comes before the last answer is cut to max_source_length
        as in encode_prompt; the answer is cut off after max_target_length. source_tokens and target_tokens are the
        lengths of both before any cut, source_kept what is left of the first.
        """
        whole, kept = self._within(partial(encode_turns, tokenizer), messages)
        lengths = {"source_tokens": whole[-1], "target_tokens": len(whole[0]) - whole[-1]}
        ids, labels, start = kept
        keep = slice(max(0, start - self.max_source_length), start + self.max_target_length)
        lengths["source_kept"] = min(start, self.max_source_length)
        return {"input_ids": ids[keep], "labels": labels[keep]} | lengths

    def encode_templated(self, tokenizer, messages: list[dict], finished: bool) -> list[int]:
        """Tokens of a conversation whose last answer is scored by a reward model that stage 3 did not train.

        That is all that the template makes of it, as any library has it, and in ChatML ends with a line break, behind
        the end token: the score is read at the last token. An answer that is not `finished` ends with its own text.
        Cut as by `encode`.
        """
        ids, start = self._within(partial(encode_whole, tokenizer, finished=finished), messages)[1]
        return ids[max(0, start - self.max_source_length) : start + self.max_target_length]

    def encode_prompt(self, tokenizer, messages: list[dict]) -> dict[str, list[int]]:
        """Tokens of a conversation that awaits an answer, input_ids: at most max_source_length of them.

        A long one loses its oldest exchanges first, but keeps the system text; then the start of what is left is cut.
        source_tokens is the length before any cut, source_kept what is left.
        """
        (_, source_tokens), (ids, _) = self._within(partial(encode_question, tokenizer), messages)
        ids = ids[-self.max_source_length :]
        return {"input_ids": ids, "source_tokens": source_tokens, "source_kept": len(ids)}

    def _within(self, encode: Callable, messages: list[dict]) -> tuple[tuple, tuple]:
        """`encode` of the whole conversation, and of it after dropping as few of its oldest exchanges as needed.

        The last item that encode returns is the number of tokens before the answer, which max_source_length limits.
        The system text and the last question stay, even if they alone exceed it.
        """
        system = messages[:1] if messages[0]["role"] == "system" else []
        later = [i for i, message in enumerate(messages) if message["role"] == "user"][1:]
        whole = encode(messages)
        if whole[-1] <= self.max_source_length or not later:
            return whole, whole
        encoded = cache(lambda start: encode(system + messages[start:]))
        fewest = bisect_left(later[:-1], True, key=lambda start: encoded(start)[-1] <= self.max_source_length)
        return whole, encoded(later[fewest])

    def eos_ids(self, model, tokenizer) -> list[int]:
        """All ids that end an answer: the tokenizer's eos, the model's, and the one that SFT trains to end a turn."""
        configured = model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        return sorted({tokenizer.eos_token_id, trained_end(tokenizer), *(i for i in configured if i is not None)})


def trained_end(tokenizer) -> int:
    """The id that SFT and RM train to end a turn."""
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return encode_turns(tokenizer, turn)[0][-1]  # LengthArguments.encode may cut it off


def render(tokenizer, messages: list[dict], **kwargs) -> str:
    """The chat template's text."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    except TemplateError as error:
        raise UserError(f"the chat template refuses a conversation: {error}") from error
    except TypeError as error:  # of an expression in it
        raise UserError(f"the chat template fails: {error}") from error


@lru_cache
def left_out(tokenizer, template: str, roles: tuple[str, ...]) -> list[int]:
    """Which turns of a conversation that awaits an answer the template does not show: its answers are not looked for.

    A template that refuses a conversation because of its system text does not show that.
    """
    numbers = [f"7{number:08}7" for number in range(len(roles))]  # digits: templates trim, escape and change case
    turns = [{"role": role, "content": number} for role, number in zip(roles, numbers, strict=True)]
    try:
        text = render(tokenizer, turns, add_generation_prompt=True)
    except UserError:
        if roles[0] != "system" or len(roles) < 2:
            raise
        return [0]
    return [i for i, role in enumerate(roles) if role != "assistant" and numbers[i] not in text]


def shown(tokenizer, messages: list[dict]) -> list[dict]:
    """A conversation that awaits an answer, as the template can show it.

    A system text that the template leaves out is put before the first question.

    Raises:
        UserError: when it leaves out another turn, since the model would learn to do without.
    """
    missing = left_out(tokenizer, tokenizer.get_chat_template(), tuple(message["role"] for message in messages))
    if not missing:
        return messages
    turn = messages[missing[0]]
    if missing[0] == 0 and turn["role"] == "system" and len(messages) > 1:
        first = {"role": "user", "content": turn["content"] + "\n\n" + messages[1]["content"]}
        return shown(tokenizer, [first, *messages[2:]])
    raise UserError(
        f"the chat template leaves out the {turn['role']} turn {turn['content'][:60]!r}: say it in a turn that the "
        "template has, or take the record out"
    )


def encode_question(tokenizer, messages: list[dict]) -> tuple[list[int], int]:
    """Token ids of a whole conversation that awaits an answer, and how many they are."""
    text = render(tokenizer, shown(tokenizer, messages), add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, len(ids)


def encode_whole(tokenizer, messages: list[dict], finished: bool) -> tuple[list[int], int]:
    """Token ids of what the template makes of a conversation, up to the last answer's text if that is not `finished`,
    and how many come before that text.
    """
    messages = [*shown(tokenizer, messages[:-1]), messages[-1]]
    text = render(tokenizer, messages)
    before, _, ending = render(tokenizer, [*messages[:-1], messages[-1] | {"content": MARKER}]).partition(MARKER)
    texts = [text if finished else text.removesuffix(ending), before]
    ids, start = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids, len(start)


def encode_turns(tokenizer, messages: list[dict]) -> tuple[list[int], list[int], int]:
    """input_ids and labels of a whole conversation (see LengthArguments.encode), and where the last answer starts.

    The last answer's labels begin where the template's generation prompt ends: what the template puts in between
    (Qwen3's empty thoughts) the model must say itself, and text that only prompts have (Mistral's system text) is seen
    in training too. Templates are rendered with a marker in place of each answer, so that an answer is found by its
    place, not by its words. The template thus does not see an answer's own thoughts: they replace the empty ones that
    it inserts, or continue the <think> that its prompt ends with. An answer without any closes that <think> first.
    """
    messages = [*shown(tokenizer, messages[:-1]), messages[-1]]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    marker = MARKER.format
    numbered = iter(range(len(answers)))
    marked = [m | {"content": marker(next(numbered))} if m["role"] == "assistant" else m for m in messages]
    prompt = render(tokenizer, marked[:-1], add_generation_prompt=True)
    before, found, ending = render(tokenizer, marked).partition(marker(len(answers) - 1))
    between, last = before[len(prompt) :] if before.startswith(prompt) else "", answers[-1]
    opened = prompt.rstrip().endswith("<think>")
    if opened and "</think>" in last:
        between, last = "", OPENING.sub("", last)
    elif opened and "</think>" not in between:
        between = NO_THOUGHTS
    elif "</think>" in last:
        between = EMPTY_THOUGHTS.sub("", between)
    text, spans = "", []
    for number, answer in enumerate(answers[:-1]):
        before, marked_here, prompt = prompt.partition(marker(number))
        before = EMPTY_THOUGHTS.sub("", before) if "</think>" in answer else before
        found = found and marked_here
        spans.append((len(text + before), len(text + before + answer)))
        text += before + answer
    if not found:
        raise UserError("the chat template leaves out or rewrites assistant turns: it cannot be trained on")
    text += prompt
    spans.append((len(text), len(text + between + last)))
    text += between + last + ending
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} is written in Python and does not tell which characters a token stands for: "
            "expected a model with a fast tokenizer (tokenizer.json)"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return mask_answers(tokenizer, encoded["input_ids"], encoded["offset_mapping"], spans)


def warn_of_joined_tokens(tokenizer) -> None:
    """Warn where the template's prompt ends inside a token, of which the answer's text is the rest.

    The model would be trained to answer behind other tokens than those it is asked with.
    """
    asked, answer = [{"role": "user", "content": "Hello."}], {"role": "assistant", "content": "Hello."}
    try:
        prompt, count = encode_question(tokenizer, asked)
        trained = encode_turns(tokenizer, [*asked, answer])[0]
    except UserError:
        return  # which each record will say
    if trained[:count] != prompt:
        end = tokenizer.decode(prompt[-3:])
        logger.warning(
            f"The chat template's prompt ends in {end!r}, and an answer's first token takes some of it in: training "
            "and inference differ there. End the prompt with a special token or a line break"
        )


@lru_cache
def special_ids(tokenizer, eos_token_id: int) -> set[int]:
    """Ids of the special tokens. To list 6,000 added tokens takes 25 times as long as all else of a record."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {eos_token_id}


def mask_answers(tokenizer, ids, offsets, spans) -> tuple[list[int], list[int], int]:
    """input_ids, labels that are -100 outside the character `spans` and the special token that follows each (with the
    space before it that some templates have), and where the last answer starts.

    Everything after the last answer's end is cut off; if the template puts no special token there, eos is added. A
    token that begins before a span and ends in it ("Assistant:" + " a") belongs to the answer.
    """
    special = special_ids(tokenizer, tokenizer.eos_token_id)
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
            labels[position : closing + 1] = ids[position : closing + 1]
            position = closing + 1
    if position and labels[position - 1] in special:
        return ids[:position], labels[:position], answer
    return ids[:position] + [tokenizer.eos_token_id], labels[:position] + [tokenizer.eos_token_id], answer


def judged(encode: Callable, rows: Dataset, tokenizer) -> Callable:
    """`encode` for Dataset.map: a row that it refuses becomes empty, with the reason in the column "bad"."""

    def known(encoded):
        return {k: known_ids(tokenizer, v) if isinstance(v, list) else v for k, v in encoded.items()}

    @cache
    def nothing():
        """Empty values of the right types, which an Arrow file needs in every row."""
        reason = None
        for row in rows:
            try:
                encoded = compact(known(encode(row)))
                return {name: value[:0] if isinstance(value, np.ndarray) else 0 for name, value in encoded.items()}
            except UserError as error:
                reason = reason or f"{row['place']}: {error}"
        raise UserError(f"no record can be used, of {len(rows)}; the first one: {reason}")

    def judge(row):
        try:
            refuse_ends(tokenizer, row)
            return compact(known(encode(row))) | {"bad": ""}
        except UserError as error:
            return nothing() | {"bad": str(error)}

    return judge


def refuse_ends(tokenizer, row: dict) -> None:
    """Refuse answers that go on behind the text of the end token, which the tokenizer reads as the end."""
    said = [turn["content"] for turn in row.get("messages", ()) if turn["role"] == "assistant"]
    for text in said + [row[name] for name in ("chosen", "rejected") if name in row]:
        if tokenizer.eos_token in text.removesuffix(tokenizer.eos_token):
            raise UserError(f"an answer goes on behind the text {tokenizer.eos_token!r}, which ends it: take that out")


def embedding_rows(tokenizer) -> float:
    """How many ids the model has embeddings for; no limit is known for a tokenizer that was loaded by itself."""
    return getattr(tokenizer, "embedding_rows", math.inf)


def known_ids(tokenizer, ids: list[int]) -> list[int]:
    """The ids.

    Raises:
        UserError: when the model has no embedding for one: a token was added without resizing it, or the tokenizer is
            another model's.
    """
    largest, rows = max(ids, default=0), embedding_rows(tokenizer)
    if largest >= rows:
        raise UserError(
            f"the token {tokenizer.convert_ids_to_tokens(largest)!r} has the id {largest}, but the model has {rows} "
            "embeddings: name the model's own tokenizer, take that out of the text, or grow the model (docs/faq.md)"
        )
    return ids


def compact(encoded: dict) -> dict:
    """Lists of token ids as int32, 4 bytes each on disk; datasets returns them as lists of int."""
    return {k: np.asarray(v, dtype=np.int32) if isinstance(v, list) else v for k, v in encoded.items()}
