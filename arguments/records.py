"""Record forms: how files are read, and how each form seen in the wild becomes one canonical form.

Documents are strings. A conversation is a list of {"role", "content"} messages. A pair is
{"prompt": messages, "chosen": str, "rejected": str}.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

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
INVISIBLE = " \t\r\n\u3000\u200b\ufeff"
SUFFIXES = (".txt", ".json", ".jsonl", ".txt.gz", ".json.gz", ".jsonl.gz")


class BadRecord(ValueError):
    """A record that cannot be used: what was found and what was expected."""


def find_files(folder: str) -> list[Path]:
    """Every readable data file under `folder` (searched recursively), or `folder` itself when it is a file."""
    root = Path(folder)
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    return [path for path in files if path.is_file() and path.name.endswith(SUFFIXES)]


def read_file(path: Path) -> Iterator[tuple[str, object]]:
    """Yield (file:line, record) for each record; a record of a .txt file is {"text": line}.

    Raises:
        BadRecord: when the file is neither UTF-8 nor GB18030, or a line is no JSON.
    """
    raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    text = decode(raw, path)
    if ".txt" in path.suffixes:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip(INVISIBLE):
                yield f"{path}:{number}", {"text": line}
    elif text.lstrip().startswith("["):
        yield from read_json_array(text, path)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip(INVISIBLE):
                yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


def decode(raw: bytes, path: Path) -> str:
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise BadRecord(f"{path}: neither UTF-8 nor GB18030 text")


def parse_json(text: str, place: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"{place}: not JSON ({error.msg} at column {error.colno}): {text.strip()[:60]}") from error


def read_json_array(text: str, path: Path) -> Iterator[tuple[str, object]]:
    """Records of a JSON array, each with the line it starts on."""
    decoder, position = json.JSONDecoder(), text.index("[") + 1
    line, counted = 1, 0
    while True:
        position += len(text[position:]) - len(text[position:].lstrip(INVISIBLE + ","))
        if text[position : position + 1] in ("]", ""):
            return
        line, counted = line + text.count("\n", counted, position), position
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise BadRecord(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
        yield f"{path}:{line}", record


def clean(value) -> str:
    """A record's text without invisible characters around it; null counts as empty."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"expected text, found {type(value).__name__}: {str(value)[:60]}")
    return value.replace("\r\n", "\n").strip(INVISIBLE)


def to_messages(turns, closed: bool) -> list[dict]:
    """ShareGPT or OpenAI turns as messages: empty turns and leading answers go, neighbours of one role are joined.

    With `closed`, questions after the last answer go too.
    """
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadRecord(f"expected a turn like {{'role', 'content'}}, found {str(turn)[:60]}")
        role = ROLES.get(turn.get("role", turn.get("from")))
        if role is None:
            raise BadRecord(f"unknown role {turn.get('role', turn.get('from'))!r}, expected one of {', '.join(ROLES)}")
        content = clean(turn.get("content", turn.get("value")))
        if not content or (role == "assistant" and not any(m["role"] == "user" for m in messages)):
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n" + content
        else:
            messages.append({"role": role, "content": content})
    while closed and messages and messages[-1]["role"] != "assistant":
        messages.pop()
    return messages


def with_history(record: dict, question: str) -> list[dict]:
    """System prompt, history [[question, answer], ...] and `question` as messages."""
    turns = [{"role": "system", "content": record.get("system")}]
    for exchange in record.get("history") or []:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise BadRecord(f"expected history as [[question, answer], ...], found {str(exchange)[:60]}")
        turns += [{"role": "user", "content": exchange[0]}, {"role": "assistant", "content": exchange[1]}]
    return to_messages([*turns, {"role": "user", "content": question}], closed=False)


def need(record, form: str) -> dict:
    if not isinstance(record, dict):
        raise BadRecord(f"expected {form}, found {type(record).__name__}")
    return record


def to_document(record) -> str:
    """{"text"} as the text."""
    record = need(record, '{"text": ...}')
    if "text" not in record:
        raise BadRecord(f'expected {{"text": ...}}, found keys {", ".join(record)}')
    text = clean(record["text"])
    if not text:
        raise BadRecord("the text is empty")
    return text


def to_prompt(record) -> list[dict]:
    """Any SFT record or {"prompt"}: the messages up to the last answer, which is left out."""
    form = "{prompt}, {messages}, {conversations} or {instruction, input, output}"
    record = need(record, form)
    if "messages" in record or "conversations" in record:
        messages = to_messages(record.get("messages") or record.get("conversations") or [], closed=False)
        messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    elif "instruction" in record:
        question = "\n".join(filter(None, (clean(record["instruction"]), clean(record.get("input")))))
        messages = with_history(record, question)
    elif isinstance(record.get("prompt"), list):
        messages = to_messages(record["prompt"], closed=False)
    elif "prompt" in record:
        messages = with_history(record, record["prompt"])
    else:
        raise BadRecord(f"expected {form}, found keys {', '.join(record)}")
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise BadRecord("there is no question")
    return messages


def to_conversation(record) -> list[dict]:
    """Any SFT form as messages that end with an answer."""
    form = "{messages}, {conversations}, {instruction, input, output} or {prompt, completion}"
    record = need(record, form)
    if "messages" in record or "conversations" in record:
        messages = to_messages(record.get("messages") or record.get("conversations") or [], closed=True)
    elif "instruction" in record or "completion" in record:
        answer = record.get("output", record.get("completion"))
        answer = answer[-1].get("content") if isinstance(answer, list) and answer else answer
        messages = to_messages([*to_prompt(record), {"role": "assistant", "content": answer}], closed=True)
    else:
        raise BadRecord(f"expected {form}, found keys {', '.join(record)}")
    if not messages:
        raise BadRecord("there is no question with an answer")
    return messages


def to_pair(record) -> dict:
    """Any pair form as {"prompt": messages, "chosen": str, "rejected": str}."""
    form = "{question, response_chosen, response_rejected} or {prompt or conversations, chosen, rejected}"
    record = need(record, form)
    chosen, rejected = (record.get(k, record.get(f"response_{k}")) for k in ("chosen", "rejected"))
    if "question" in record:
        prompt = with_history(record, record["question"])
    elif "conversations" in record or "prompt" in record:
        prompt = to_prompt(record)
    elif isinstance(chosen, list):
        prompt = to_messages(chosen[:-1], closed=False)
    else:
        raise BadRecord(f"expected {form}, found keys {', '.join(record)}")
    pair = {"prompt": prompt, "chosen": last_answer(chosen), "rejected": last_answer(rejected)}
    if not all(pair.values()):
        raise BadRecord(f"{next(k for k, v in pair.items() if not v)} is empty; expected {form}")
    if pair["chosen"] == pair["rejected"]:
        raise BadRecord("chosen and rejected are the same text")
    return pair


def last_answer(answer) -> str:
    """A response as text: itself, or the content of its last turn."""
    if isinstance(answer, list) and answer:
        answer = answer[-1]
    if isinstance(answer, dict):
        answer = answer.get("content", answer.get("value"))
    return clean(answer)
