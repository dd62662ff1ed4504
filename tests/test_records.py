"""Every record form to its canonical form, files in every encoding, and errors that name file and line."""

import gzip
import json
import re

import pytest

from arguments import DataArguments, UserError
from arguments.records import (
    BadRecord,
    find_files,
    read_file,
    to_conversation,
    to_document,
    to_pair,
    to_prompt,
)


def chat(*turns):
    """("user", "q"), ... as messages."""
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns):
    return [{"from": role, "value": value} for role, value in turns]


QA = chat(("user", "q"), ("assistant", "a"))
Q1A1Q2 = chat(("user", "q1"), ("assistant", "a1"), ("user", "q2"))
SYSTEM = chat(("system", "s"))

CONVERSATIONS = {
    "instruction": ({"instruction": "q", "input": "", "output": "a"}, QA),
    "instruction and input": (
        {"instruction": "q", "input": "i", "output": "a"},
        chat(("user", "q\ni"), ("assistant", "a")),
    ),
    "input alone": ({"instruction": "", "input": "q", "output": "a"}, QA),
    "instruction, system, history": (
        {"instruction": "q2", "output": "a2", "system": "s", "history": [["q1", "a1"]]},
        SYSTEM + Q1A1Q2 + chat(("assistant", "a2")),
    ),
    "null optional keys": ({"instruction": "q", "input": None, "output": "a", "history": None, "system": None}, QA),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, QA),
    "prompt and completion as messages": (
        {"prompt": SYSTEM + chat(("user", "q")), "completion": chat(("assistant", "a"))},
        SYSTEM + QA,
    ),
    "completion as a list of text": ({"prompt": "q", "completion": ["a"]}, QA),
    "messages": ({"messages": SYSTEM + QA}, SYSTEM + QA),
    "null messages beside instruction": ({"messages": None, "instruction": "q", "output": "a"}, QA),
    "null instruction beside prompt": ({"instruction": None, "output": None, "prompt": "q", "completion": "a"}, QA),
    "null messages beside conversations": (
        {"messages": None, "conversations": sharegpt(("human", "q"), ("gpt", "a"))},
        QA,
    ),
    "sharegpt": (
        {"conversations": sharegpt(("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2"))},
        SYSTEM + Q1A1Q2 + chat(("assistant", "a2")),
    ),
    "sharegpt tools": (
        {"conversations": sharegpt(("human", "q"), ("function_call", "f()"), ("observation", "1"), ("gpt", "a"))},
        chat(("user", "q"), ("assistant", "f()"), ("tool", "1"), ("assistant", "a")),
    ),
    "last turn from human": ({"conversations": sharegpt(("human", "q"), ("gpt", "a"), ("human", "q2"))}, QA),
    "leading gpt turn": (
        {"conversations": sharegpt(("system", "s"), ("gpt", "Hi!"), ("human", "q"), ("gpt", "a"))},
        SYSTEM + QA,
    ),
    "empty turns": (
        {"conversations": sharegpt(("human", "q1"), ("gpt", " \n"), ("human", "q2"), ("gpt", None), ("gpt", "a"))},
        chat(("user", "q1\nq2"), ("assistant", "a")),
    ),
    "neighbours of one role": (
        {"messages": chat(("user", "q1"), ("user", "q2"), ("assistant", "a1"), ("assistant", "a2"))},
        chat(("user", "q1\nq2"), ("assistant", "a1\na2")),
    ),
    "CRLF and invisible characters": (
        {"instruction": "\ufeff\u3000q1\r\nq2\u200b", "input": "\u200b", "output": "\u3000\u3000a b\u3000c\r\n"},
        chat(("user", "q1\nq2"), ("assistant", "a b\u3000c")),
    ),
}


@pytest.mark.parametrize(("record", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversation_forms(record, expected):
    assert to_conversation(record) == expected


PAIRS = {
    "question": ({"question": "q", "response_chosen": "good", "response_rejected": "bad"}, chat(("user", "q"))),
    "question, system, history": (
        {
            "system": "s",
            "history": [["q1", "a1"]],
            "question": "q2",
            "response_chosen": "good\r\n",
            "response_rejected": "\u3000bad",
            "kind": "unsafe",
        },
        SYSTEM + Q1A1Q2,
    ),
    "conversations": (
        {
            "conversations": sharegpt(("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2")),
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        SYSTEM + Q1A1Q2,
    ),
    "prompt": ({"prompt": "q", "chosen": "good", "rejected": "bad"}, chat(("user", "q"))),
    "prompt and answers as messages": (
        {"prompt": Q1A1Q2, "chosen": chat(("assistant", "good")), "rejected": chat(("assistant", "bad"))},
        Q1A1Q2,
    ),
    "null conversations": (
        {"conversations": None, "prompt": "q", "chosen": "good", "rejected": "bad"},
        chat(("user", "q")),
    ),
    "null question": ({"question": None, "prompt": "q", "chosen": "good", "rejected": "bad"}, chat(("user", "q"))),
    "null chosen": (
        {"question": "q", "chosen": None, "response_chosen": "good", "response_rejected": "bad"},
        chat(("user", "q")),
    ),
    "lists that share their start": (
        {"chosen": Q1A1Q2 + chat(("assistant", "good")), "rejected": Q1A1Q2 + chat(("assistant", "bad"))},
        Q1A1Q2,
    ),
}


@pytest.mark.parametrize(("record", "prompt"), PAIRS.values(), ids=PAIRS)
def test_pair_forms(record, prompt):
    assert to_pair(record) == {"prompt": prompt, "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q"}, chat(("user", "q"))),
        ({"prompt": "q2", "system": "s", "history": [["q1", "a1"]]}, SYSTEM + Q1A1Q2),
        ({"prompt": Q1A1Q2}, Q1A1Q2),
        ({"messages": Q1A1Q2 + chat(("assistant", "a2"))}, Q1A1Q2),
        ({"conversations": sharegpt(("human", "q1"), ("gpt", "a1"), ("human", "q2"))}, Q1A1Q2),
        ({"instruction": "q", "input": "i", "output": "a"}, chat(("user", "q\ni"))),
        (
            {"messages": chat(("user", "q"), ("function_call", "f()"), ("observation", "1"))},
            chat(("user", "q"), ("assistant", "f()"), ("tool", "1")),
        ),
    ],
)
def test_prompt_forms(record, expected):
    assert to_prompt(record) == expected


@pytest.mark.parametrize(
    ("convert", "record", "message"),
    [
        (to_document, {"txt": "x"}, "expected .*text.*found keys txt"),
        (to_document, {"text": "\u3000\u200b"}, "the text is empty"),
        (to_document, {"text": 3}, "expected text, found int: 3"),
        (to_document, ["x"], "found list"),
        (to_conversation, {"q": "x", "a": "y"}, "found keys q, a"),
        (to_conversation, {"instruction": "q", "output": ""}, "no question with an answer"),
        (to_conversation, {"instruction": "", "input": None, "output": "a"}, "there is no question"),
        (to_conversation, {"completion": "a"}, "found keys completion"),
        (to_conversation, {"conversations": sharegpt(("gpt", "a"))}, "no question with an answer"),
        (to_conversation, {"conversations": sharegpt(("alien", "a"))}, "unknown role 'alien'"),
        (to_conversation, {"messages": ["q", "a"]}, "expected a turn"),
        (to_conversation, {"instruction": "q", "output": "a", "history": [["q"]]}, "expected history as"),
        (to_prompt, {"prompt": ""}, "there is no question"),
        (to_prompt, {"question": "q"}, "found keys question"),
        (to_pair, {"prompt": "q", "chosen": "same", "rejected": "same\u3000"}, "the same text"),
        (to_pair, {"prompt": "q", "chosen": "good"}, "rejected is empty"),
        (to_pair, {"chosen": "good", "rejected": "bad"}, "found keys chosen, rejected"),
        (to_pair, {"question": "", "response_chosen": "good", "response_rejected": "bad"}, "prompt is empty"),
        (
            to_pair,
            {"question": "", "history": [["q", "a"]], "response_chosen": "good", "response_rejected": "bad"},
            "there is no question",
        ),
        (to_pair, {"chosen": Q1A1Q2, "rejected": QA}, "expected an answer, found a turn of user"),
        (to_conversation, {"messages": 5}, "expected a list of turns, found 5"),
        (to_conversation, {"instruction": "q", "output": "a", "history": 5}, "expected history as .*found 5"),
        (to_conversation, {"messages": [{"role": ["user"], "content": "q"}]}, r"unknown role \['user'\]"),
    ],
)
def test_refused_records(convert, record, message):
    with pytest.raises(BadRecord, match=message):
        convert(record)


ROWS = [{"text": "高血压。"}, {"text": "Asthma."}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=1)

FILES = {
    "jsonl": ("a.jsonl", LINES.encode(), [1, 2]),
    "CRLF": ("a.jsonl", LINES.replace("\n", "\r\n").encode(), [1, 2]),
    "BOM": ("a.jsonl", b"\xef\xbb\xbf" + LINES.encode(), [1, 2]),
    "blank lines": ("a.jsonl", ("\n" + LINES.replace("\n", "\n\u3000\u200b\n\n")).encode(), [2, 5]),
    "no final newline": ("a.jsonl", LINES.rstrip().encode(), [1, 2]),
    "GB18030": ("a.jsonl", LINES.encode("gb18030"), [1, 2]),
    "GB18030, BOM": ("a.jsonl", ("\ufeff" + LINES).encode("gb18030"), [1, 2]),
    "invisible before a line": ("a.jsonl", ("\u3000" + LINES).encode(), [1, 2]),
    "invisible after a line": ("a.jsonl", LINES.replace("\n", "\u200b\n").encode(), [1, 2]),
    ".txt in the stem": ("a.txt.jsonl", LINES.encode(), [1, 2]),
    "gzip": ("a.jsonl.gz", gzip.compress(LINES.encode()), [1, 2]),
    "json of lines": ("a.json", LINES.encode(), [1, 2]),
    "json array": ("a.json", ARRAY.encode(), [2, 5]),
    "json array, invisible before it": ("a.json", ("\u200b" + ARRAY).encode(), [2, 5]),
    "json array, BOM, CRLF": ("a.json", b"\xef\xbb\xbf" + ARRAY.replace("\n", "\r\n").encode(), [2, 5]),
    "json array, GB18030, gzip": ("a.json.gz", gzip.compress(ARRAY.encode("gb18030")), [2, 5]),
    "json array in .jsonl": ("a.jsonl", ARRAY.encode(), [2, 5]),
    "txt": ("a.txt", "高血压。\r\n\n \u3000\nAsthma.\n".encode(), [1, 4]),
    "txt, GB18030, gzip": ("a.txt.gz", gzip.compress("高血压。\nAsthma.".encode("gb18030")), [1, 2]),
}


@pytest.mark.parametrize(("name", "raw", "lines"), FILES.values(), ids=FILES)
def test_files(tmp_path, name, raw, lines):
    path = tmp_path / name
    path.write_bytes(raw)
    found = list(read_file(path))
    assert [place for place, _ in found] == [f"{path}:{line}" for line in lines]
    assert [{"text": to_document(record)} for _, record in found] == ROWS


def test_folders_are_searched_recursively(tmp_path):
    for name in ("b/c.txt", "a.jsonl", "a.md", "b/d.json.gz", "b/notes.json.bak"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in find_files(tmp_path)] == ["a.jsonl", "b/c.txt", "b/d.json.gz"]
    assert find_files(tmp_path / "a.jsonl") == [tmp_path / "a.jsonl"]


GOOD = '{"prompt": "q", "chosen": "a", "rejected": "b"}'
SAME = '{"prompt": "q", "chosen": "a", "rejected": "a"}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "\n{oops\n", "a.json:2: not JSON .*oops"),
        (GOOD + '\n\n{"q": "x"}\n', "a.json:3: expected .*found keys q"),
        (GOOD + "\n" + SAME, "a.json:2: chosen and rejected are the same text"),
        (f"[\n{GOOD},\n{SAME}\n]", "a.json:3: chosen and rejected are the same text"),
        (f"[\n{GOOD},\n{{oops}}\n]", "a.json:3: not JSON"),
        ("\n".join([SAME] * 12), "12 bad records .*--bad_records skip.*a.json:10: .*and 2 more"),
    ],
)
def test_errors_name_file_and_line(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as error:
        DataArguments(train_file_dir=str(tmp_path)).load_pairs()
    assert re.search(message, str(error.value), re.DOTALL)


def load_texts(folder, **kwargs):
    args = DataArguments(train_file_dir=str(folder), validation_file_dir=str(folder), **kwargs)
    return args.load_documents()[0]["text"]


def test_bad_records_are_skipped_on_request(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n{"text": ""}\n{"text": "four"}\n')
    assert load_texts(tmp_path, bad_records="skip") == ["one", "four"]


@pytest.mark.parametrize(
    "text",
    [
        '{"text": "one"}\n{oops\n{"text": "three"}\n',
        '[{"text": "one"},\n{"text": 2},\n{"text": "three"},\n{"text": "four"',  # what was whole stays
    ],
)
def test_skipping_a_bad_line_keeps_the_rest_of_the_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert load_texts(tmp_path, bad_records="skip") == ["one", "three"]


def test_a_line_that_cannot_be_read_is_found_in_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{oops\n{"text": "three"}\n')
    places, found = zip(*read_file(path), strict=True)
    assert places == (f"{path}:1", f"{path}:2", f"{path}:3")
    assert isinstance(found[1], BadRecord)
    assert re.fullmatch(r"not JSON \(.*column 2.*\): \{oops", str(found[1]))
    assert (found[0], found[2]) == ({"text": "one"}, {"text": "three"})


CUT = b'[{"text": "one"},\n{"text": "two"}'
BROKEN = {  # the records read before the break, the place and the words of the bad one
    "cut.json": (CUT, ["one", "two"], ":2", r"not JSON .*; the rest is not read"),
    "behind.json": (CUT + b']\n{"text": "three"}', ["one", "two"], ":2", "text after the array's end: "),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-12], [], "", "cannot be read: "),
    "damaged.jsonl.gz": (gzip.compress(LINES.encode())[:10] + b"\xff" * 20, [], "", "cannot be read: "),
    "no.jsonl.gz": (LINES.encode(), [], "", "cannot be read: "),
    "no_encoding.jsonl": (b'{"text": "\xff\xff"}', [], "", "cannot be read: neither UTF-8 nor GB18030 text"),
}


@pytest.mark.parametrize(("name", "raw", "texts", "line", "message"), [(k, *v) for k, v in BROKEN.items()], ids=BROKEN)
def test_broken_files_are_named(tmp_path, name, raw, texts, line, message):
    path = tmp_path / name
    path.write_bytes(raw)
    *whole, (place, error) = read_file(path)
    assert [record["text"] for _, record in whole] == texts
    assert place == f"{path}{line}"
    assert isinstance(error, BadRecord) and re.match(message, str(error))
    with pytest.raises(UserError) as refused:
        load_texts(tmp_path)
    assert f"{place}: {error}" in str(refused.value)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder of records: .*nowhere"):
        load_texts(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no file that ends in .txt, .json, .jsonl"):
        load_texts(tmp_path)
