"""Record forms: how each form seen in the wild becomes one canonical form.

Documents are strings. A conversation is a list of {"role", "content"} messages. A pair is
{"prompt": messages, "chosen": str, "rejected": str}.
"""

import re
from difflib import get_close_matches
from functools import cache

from arguments.files import INVISIBLE, BadRecord, is_blank

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
SPEAKERS = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # before each turn of a conversation that is one text
CALL = "which no template here would show: write the call as its content"
KEYS = "text", "messages", "conversations", "instruction", "input", "output", "prompt", "completion"
KEYS += "question", "chosen", "rejected", "response_chosen", "response_rejected"
THOUGHTS = "which is not trained: put the thoughts before its content, as <think>...</think>, or take the key out"
# Keys of a turn besides its text that would change what is learned, and what to do about them.
BESIDE_TEXT = {"tool_calls": CALL, "function_call": CALL, "reasoning_content": THOUGHTS, "thinking": THOUGHTS}
TRAINS = "weight", "loss", "train", "training"  # with which others say whether an answer is learned


def clean(value) -> str:
    """A record's text without invisible characters around it; null and what shows nothing count as empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"expected text, found {type(value).__name__}: {str(value)[:60]}")
    return "" if is_blank(value) else value.replace("\r\n", "\n").strip(INVISIBLE)


def to_messages(turns, closed: bool) -> list[dict]:
    """ShareGPT or OpenAI turns as messages: empty turns and leading answers go, neighbours of one role are joined.

    With `closed`, questions after the last answer go too.
    """
    if not isinstance(turns, list):
        raise BadRecord(f"expected a list of turns, found {str(turns)[:60]}")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRecord(f"expected a turn like {{'role', 'content'}}, found {str(turn)[:60]}")
        role = role_of(turn)
        if role is None:
            raise BadRecord(
                f"unknown role {turn.get('role') or turn.get('from')!r}, expected one of {', '.join(ROLES)}"
            )
        content = text_of(turn, role)
        if not content or (role == "assistant" and not any(m["role"] == "user" for m in messages)):
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    while closed and messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


def is_turn(value) -> bool:
    return isinstance(value, dict) and not value.keys().isdisjoint(("role", "from"))


def role_of(turn: dict) -> str | None:
    """Who speaks, in today's terms and written in any case; None for an unknown one."""
    return ROLES.get(str(turn.get("role") or turn.get("from")).lower())


def is_answer(turn) -> bool:
    return isinstance(turn, dict) and role_of(turn) == "assistant"


def text_of(turn: dict, role: str) -> str:
    """What a turn says.

    Raises:
        BadRecord: when it has more to teach than its text, or is an answer that should not be learned.
    """
    for key, advice in BESIDE_TEXT.items():
        if turn.get(key):
            raise BadRecord(f"a turn has {key}, {advice}")
    for key in TRAINS if role == "assistant" else ():
        if turn.get(key) not in (None, 1):  # 1 is True
            raise BadRecord(
                f"an answer has {key} {turn[key]!r}, but all are trained alike: take the key out, or end the "
                "conversation before that answer"
            )
    if turn.keys().isdisjoint(("content", "value")) and any(turn[key] for key in turn.keys() - {"role", "from"}):
        raise BadRecord(f"a turn has neither content nor value; found keys {', '.join(map(str, turn))}")
    content = turn.get("content")
    return clean(turn.get("value") if content is None else content)  # columns of Arrow put a null beside the other


def with_system(record: dict, turns: list) -> list:
    """The turns, preceded by the record's own system text unless a system turn is among them.

    Raises:
        BadRecord: when the record holds tools, too.
    """
    for key in ("tools", "functions"):
        if str(record.get(key) or "").strip(INVISIBLE + "[]{}").lower() not in ("", "null", "none"):
            raise BadRecord(
                f"the record has {key}, which no template here would show: put them into the system text, and take "
                "the key out"
            )
    beside = record.get("system") or record.get("system_prompt")
    systems = [turn for turn in turns if isinstance(turn, dict) and role_of(turn) == "system"]
    own = any(turn.get("content") or turn.get("value") for turn in systems)
    return turns if not beside or own else [{"role": "system", "content": beside}, *turns]


def turns_of(record: dict) -> list:
    """The turns of {"messages"} or {"conversations"}."""
    turns = record.get("messages") or record.get("conversations") or []
    return with_system(record, turns) if isinstance(turns, list) else turns


@cache
def nearest(key: str, names: tuple[str, ...]) -> str | None:
    """The name that a key is perhaps meant to be, and is not."""
    return None if key in names else next(iter(get_close_matches(key.lower(), names, n=1, cutoff=0.85)), None)


def refuse_misspelt(record: dict, *names: str) -> None:
    """Refuse a record with a key that is nearly one of `names`, which are optional: it would be left out silently."""
    for key, value in record.items():
        name = nearest(str(key), names)
        if name and value and name not in record:
            raise BadRecord(f"the key {key!r} is not read. Is it {name!r}? Rename it, or take it out")


def refuse_input(record: dict) -> None:
    """Refuse a record whose `input`, or a key that is nearly that, belongs to no instruction: it is not read there."""
    if "instruction" in record:
        return
    asked = str(record.get("prompt", record.get("question")))
    for key, value in record.items():
        unread = str(value or "").strip(INVISIBLE) not in asked  # "" is in any text
        if unread and (key == "input" or nearest(str(key), ("input",))):
            raise BadRecord(f"the key {key!r} is read beside an instruction alone: add its text to the question")


def with_history(record: dict, question: str) -> list[dict]:
    """System prompt, history [[question, answer], ...] and `question` as messages."""
    refuse_misspelt(record, "history", "system", "system_prompt")
    turns, history = with_system(record, []), record.get("history") or []
    if isinstance(history, str) and not history.strip(INVISIBLE + "[]"):  # a .csv's cell
        history = []
    for exchange in history if isinstance(history, list) else [history]:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise BadRecord(f"expected history as [[question, answer], ...], found {str(exchange)[:60]}")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return to_messages([*turns, {"role": "user", "content": question}], closed=False)


def need(record, form: str) -> dict:
    """The record without its null values."""
    if not isinstance(record, dict):
        raise BadRecord(f"expected {form}, found {type(record).__name__}")
    return {key: value for key, value in record.items() if value is not None}


def found_keys(record: dict) -> str:
    """The keys of a record that has no form, and what may be wrong with them."""
    names = ", ".join(record)
    meant = [f"{key!r} should be {name!r}" for key in record if (name := nearest(key, KEYS))]
    if len(record) == 1 and (sign := next((sign for sign in ";\t|" if sign in names), None)):
        meant = [f"columns are separated by commas here, not by {sign!r}"]
    if "text" in record:
        meant = ["a text, as each line of a .txt is one, is for PT alone"]
    return "; ".join([f"found keys {names}", *meant])


def to_document(record) -> str:
    """{"text"} as the text."""
    record = need(record, '{"text": ...}')
    if "text" not in record:
        raise BadRecord(f'expected {{"text": ...}}, {found_keys(record)}')
    text = clean(record["text"])
    if not text:
        raise BadRecord("the text is empty")
    return text


def to_prompt(record) -> list[dict]:
    """Any SFT record or {"prompt"}: the messages up to the last answer, which is left out."""
    form = "{prompt}, {messages}, {conversations} or {instruction, input, output}"
    record = need(record, form)
    if "messages" in record or "conversations" in record:
        turns = turns_of(record)
        while isinstance(turns, list) and turns and is_answer(turns[-1]):
            turns = turns[:-1]
        messages = to_messages(turns, closed=False)
    elif "instruction" in record:
        refuse_misspelt(record, "input")
        question = "\n".join(filter(None, (clean(record["instruction"]), clean(record.get("input")))))
        messages = with_history(record, question)
    elif isinstance(record.get("prompt"), list):
        messages = to_messages(with_system(record, record["prompt"]), closed=False)
    elif "prompt" in record:
        messages = with_history(record, record["prompt"])
    else:
        raise BadRecord(f"expected {form}, {found_keys(record)}")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise BadRecord("there is no question")
    return messages


def to_question(record) -> list[dict]:
    """to_prompt, and {"text"} as what a user says."""
    return to_prompt({"prompt": record["text"]} if isinstance(record, dict) and "text" in record else record)


def to_conversation(record) -> list[dict]:
    """Any SFT form as messages that end with an answer."""
    form = "{messages}, {conversations}, {instruction, input, output} or {prompt, completion}"
    record = need(record, form)
    if "messages" in record or "conversations" in record:
        messages = to_messages(turns_of(record), closed=True)
    elif "instruction" in record or "completion" in record:
        refuse_input(record)
        answer = record.get("output", record.get("completion"))
        last = {"role": "assistant", "content": last_answer(answer)}
        earlier = answer[:-1] if isinstance(answer, list) else []
        messages = to_messages([*to_prompt(record), *earlier, last], closed=True)
    else:
        raise BadRecord(f"expected {form}, {found_keys(record)}")
    if not messages:
        raise BadRecord(f"there is no question with an answer; {found_keys(record)}")
    return messages


def to_pair(record) -> dict:
    """Any pair form as {"prompt": messages, "chosen": str, "rejected": str}."""
    form = "{question, response_chosen, response_rejected} or {prompt or conversations, chosen, rejected}"
    record = need(record, form)
    answers = {k: spoken_turns(record.get(k, record.get(f"response_{k}"))) for k in ("chosen", "rejected")}
    pair = {"prompt": pair_prompt(record, answers, form)} | {k: last_answer(answer) for k, answer in answers.items()}
    if not all(pair.values()):
        raise BadRecord(f"{next(k for k, v in pair.items() if not v)} is empty; expected {form}")
    if pair["prompt"][-1]["role"] not in ("user", "tool"):
        raise BadRecord("there is no question")
    for name, answer in answers.items():
        check_turns_before(name, answer, pair["prompt"])
    if pair["chosen"] == pair["rejected"]:
        raise BadRecord("chosen and rejected are the same text")
    return pair


def pair_prompt(record: dict, answers: dict, form: str) -> list[dict]:
    """What both answers of a pair reply to."""
    if "question" in record:
        refuse_input(record)
        return with_history(record, record["question"])
    if "prompt" in record:  # an instruction beside it is part of it
        refuse_input(record)
        return to_prompt({key: value for key, value in record.items() if key != "instruction"})
    if {"conversations", "messages", "instruction"} & record.keys():
        return to_prompt(record)
    if isinstance(answers["chosen"], list):
        return to_messages(with_system(record, answers["chosen"][:-1]), closed=False)
    if isinstance(answers["chosen"], str):
        raise BadRecord(
            "chosen and rejected are texts without the question they answer: put it beside them as prompt, or give "
            'both as lists of turns, [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]'
        )
    raise BadRecord(f"expected {form}, {found_keys(record)}")


def spoken_turns(answer):
    """The turns of a conversation that is one text, as in Anthropic's hh-rlhf; any other answer as it is."""
    parts = SPEAKERS.split(answer) if isinstance(answer, str) else []
    if len(parts) < 5 or parts[0].strip() or parts[1] != "Human":
        return answer
    return [{"role": role.lower(), "content": text} for role, text in zip(parts[1::2], parts[2::2], strict=True)]


def check_turns_before(name: str, answer, prompt: list[dict]) -> None:
    """Refuse a side of a pair whose turns before its answer are not the prompt, with or without its system text."""
    before = to_messages(answer[:-1], closed=False) if isinstance(answer, list) else []
    bare = [message for message in prompt if message["role"] != "system"]
    if before and before not in (prompt, bare):
        raise BadRecord(f"the turns before the answer of {name} differ from the question of the pair")


def last_answer(answer) -> str:
    """A response as text: itself, or the content of its last turn."""
    if isinstance(answer, list) and answer:
        answer = answer[-1]
    if is_turn(answer):
        if not is_answer(answer):
            raise BadRecord(f"expected an answer, found a turn of {answer.get('role') or answer.get('from')}")
        return text_of(answer, "assistant")
    return clean(answer)
