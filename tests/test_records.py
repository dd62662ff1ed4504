"""Every record form to its canonical form, files in every encoding, and errors that name file and line."""

import gzip
import inspect
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
from conftest import in_process, stage, write_lines
from loguru import logger

from arguments.command_line import UserError
from arguments.data import DataArguments, examples
from arguments.files import BadRecord, find_files, other_files, read_file
from arguments.records import to_conversation, to_document, to_pair, to_prompt


def chat(*turns):
    """("user", "q"), ... as messages."""
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(*turns):
    return [{"from": role, "value": value} for role, value in turns]


QA = chat(("user", "q"), ("assistant", "a"))
QI = chat(("user", "q\ni"), ("assistant", "a"))
Q1A1Q2 = chat(("user", "q1"), ("assistant", "a1"), ("user", "q2"))
SYSTEM = chat(("system", "s"))
CALL = [*chat(("user", "q")), {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]

CONVERSATIONS = {
    "instruction": ({"instruction": "q", "input": "", "output": "a"}, QA),
    "instruction and input": (
        {"instruction": "q", "input": "i", "output": "a"},
        chat(("user", "q\ni"), ("assistant", "a")),
    ),
    "instruction that ends in a newline": ({"instruction": "q\n", "input": "i\n", "output": "a\n"}, QI),
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
    "completion of several turns": (
        {"prompt": "q", "completion": chat(("assistant", "f()"), ("tool", "1"), ("assistant", "a"))},
        chat(("user", "q"), ("assistant", "f()"), ("tool", "1"), ("assistant", "a")),
    ),
    "system beside messages": ({"system": "s", "messages": QA}, SYSTEM + QA),
    "system_prompt beside conversations": (
        {"system_prompt": "s", "conversations": sharegpt(("human", "q"), ("gpt", "a"))},
        SYSTEM + QA,
    ),
    "system beside messages that have one": ({"system": "other", "messages": SYSTEM + QA}, SYSTEM + QA),
    "system_prompt beside instruction": ({"system_prompt": "s", "instruction": "q", "output": "a"}, SYSTEM + QA),
    "null tool calls": ({"messages": [message | {"tool_calls": None} for message in QA]}, QA),
    "keys that ask for nothing": (
        {
            "messages": [QA[0] | {"thinking": "", "weight": 0}, QA[1] | {"weight": 1, "reasoning_content": None}],
            "tools": "[]",
        },
        QA,
    ),
    "sharegpt with the keys of other records, as null": (
        {"conversations": [turn | {"role": None, "content": None} for turn in sharegpt(("human", "q"), ("gpt", "a"))]},
        QA,
    ),
    "completion in columns of Arrow": (
        {"prompt": "q", "completion": [{"from": "gpt", "value": "a", "role": None, "content": None}]},
        QA,
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
    "system beside turns": (
        {"system": "s", "prompt": Q1A1Q2, "chosen": "good", "rejected": "bad"},
        SYSTEM + Q1A1Q2,
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
    "a prompt beside lists that hold it": (
        {"prompt": "q", "system": "s", "chosen": QA[:1] + chat(("assistant", "good")), "rejected": "bad"},
        SYSTEM + QA[:1],
    ),
    "instruction": ({"instruction": "q", "input": "i", "chosen": "good", "rejected": "bad"}, chat(("user", "q\ni"))),
    "messages": ({"messages": Q1A1Q2, "chosen": "good", "rejected": "bad"}, Q1A1Q2),
    "a prompt and what it was made of": (
        {"prompt": "q", "instruction": "other", "chosen": "good", "rejected": "bad"},
        chat(("user", "q")),
    ),
    "whole conversations as text, of hh-rlhf": (
        {
            "chosen": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: good",
            "rejected": "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant: bad",
        },
        Q1A1Q2,
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
        *[(to_document, {"text": text}, "the text is empty") for text in ("\xa0\xa0", "\u2028\u2029\n", "\0")],
        (to_conversation, {"prompt": "q", "completion": "\u200e\u2060"}, "no question with an answer"),
        (to_prompt, {"prompt": "\xa0"}, "there is no question"),
        (to_document, {"text": 3}, "expected text, found int: 3"),
        (to_document, ["x"], "found list"),
        (to_conversation, {"q": "x", "a": "y"}, "found keys q, a$"),
        (
            to_conversation,
            {"Instruction": "q", "Output": "a"},
            "Output; 'Instruction' should be 'instruction'; 'Output'",
        ),
        (to_conversation, {"instruction;output": "q;a"}, "output; columns are separated by commas here, not by ';'"),
        (to_prompt, {"text": "q"}, "found keys text; a text, as each line of a .txt is one, is for PT alone"),
        (to_conversation, {"instruction": "q", "inputs": "x", "output": "a"}, "'inputs' is not read. Is it 'input'?"),
        (to_prompt, {"prompt": "q", "histroy": [["a", "b"]]}, "'histroy' is not read. Is it 'history'?"),
        (to_pair, {"question": "q", "sytem": "s", "chosen": "a", "rejected": "b"}, "Is it 'system'?"),
        (to_conversation, {"instruction": "q", "ouput": "a"}, "answer; found keys instruction, ouput"),
        (to_conversation, {"instruction": "", "input": None, "output": "a"}, "there is no question"),
        (to_conversation, {"completion": "a"}, "found keys completion"),
        (to_conversation, {"conversations": sharegpt(("gpt", "a"))}, "no question with an answer"),
        (to_conversation, {"conversations": sharegpt(("alien", "a"))}, "unknown role 'alien'"),
        (to_conversation, {"messages": [{"content": "a"}]}, "unknown role None"),
        (to_conversation, {"messages": ["q", "a"]}, "expected a turn"),
        (to_conversation, {"instruction": "q", "output": "a", "history": [["q"]]}, "expected history as"),
        (to_prompt, {"prompt": ""}, "there is no question"),
        (to_prompt, {"question": "q"}, "found keys question"),
        (to_pair, {"prompt": "q", "chosen": "same", "rejected": "same\u3000"}, "the same text"),
        (to_pair, {"prompt": "q", "chosen": "good"}, "rejected is empty"),
        (
            to_pair,
            {"chosen": "good", "rejected": "bad"},
            "texts without the question they answer: put it beside them as",
        ),
        (to_pair, {"chosen": None, "rejected": "bad"}, "found keys rejected"),
        (
            to_pair,
            {"chosen": QA, "rejected": chat(("user", "other"), ("assistant", "b"))},
            "the turns before the answer of rejected differ",
        ),
        (
            to_pair,
            {"prompt": "other", "chosen": QA, "rejected": "b"},
            "the turns before the answer of chosen differ",
        ),
        (to_pair, {"question": "", "response_chosen": "good", "response_rejected": "bad"}, "prompt is empty"),
        (
            to_pair,
            {"question": "", "history": [["q", "a"]], "response_chosen": "good", "response_rejected": "bad"},
            "there is no question",
        ),
        (to_pair, {"chosen": Q1A1Q2, "rejected": QA}, "expected an answer, found a turn of user"),
        (to_conversation, {"messages": CALL + QA}, "tool_calls.*write the call as its content"),
        (to_pair, {"prompt": "q", "chosen": CALL[1:], "rejected": "b"}, "tool_calls.*write the call as its content"),
        *[
            (to_conversation, {"messages": [QA[0], QA[1] | {key: "because"}]}, f"a turn has {key}, .*<think>")
            for key in ("reasoning_content", "thinking")
        ],
        (to_conversation, {"prompt": "q", "completion": [QA[1] | {"thinking": "because"}]}, "a turn has thinking"),
        (
            to_conversation,
            {"messages": [QA[0], QA[1] | {"weight": 0}, *QA]},
            "weight 0, .*end the conversation before",
        ),
        (to_conversation, {"messages": [QA[0], QA[1] | {"loss": False}]}, "an answer has loss False"),
        (to_conversation, {"instruction": "q", "output": [{"type": "x", "value": "y"}]}, "expected text, found dict"),
        (to_conversation, {"messages": QA, "tools": [{"name": "f"}]}, "has tools, .*into the system text"),
        (to_conversation, {"instruction": "q", "output": "a", "tools": '[{"name": "f"}]'}, "has tools"),
        (to_conversation, {"messages": QA, "functions": [{"name": "f"}]}, "has functions"),
        (to_prompt, {"prompt": "q", "tools": [{"name": "f"}]}, "has tools"),
        (to_pair, {"prompt": QA[:1], "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}, "has tools"),
        (to_conversation, {"prompt": "q", "completion": ["a", "b"]}, "expected a turn like .*found a"),
        (to_conversation, {"prompt": "q", "completion": QA[:1]}, "expected an answer, found a turn of user"),
        (to_conversation, {"messages": [QA[0], {"role": "assistant", "text": "a"}]}, "neither content nor value"),
        (to_conversation, {"prompt": "q", "input": "i", "completion": "a"}, "the key 'input' is read beside"),
        (to_conversation, {"prompt": "q", "inputs": "i", "completion": "a"}, "the key 'inputs' is read beside"),
        (to_pair, {"prompt": "q", "input": "i", "chosen": "a", "rejected": "b"}, "the key 'input' is read beside"),
        (to_pair, {"question": "q", "input": "i", "chosen": "a", "rejected": "b"}, "the key 'input' is read beside"),
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


def parquet(rows):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


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
    "csv": ("a.csv", 'text,id\n高血压。,1\n,\n"Asthma.",2\n, \n'.encode(), [2, 4]),
    "csv, CRLF, BOM, spaces in the header": (
        "a.csv",
        b"\xef\xbb\xbf" + " text\r\n高血压。\r\nAsthma.".encode(),
        [2, 3],
    ),
    "csv, GB18030, gzip": ("a.csv.gz", gzip.compress("text\n高血压。\nAsthma.".encode("gb18030")), [2, 3]),
    "parquet": ("a.parquet", parquet(ROWS), [1, 2]),
    "parquet, gzip": ("a.parquet.gz", gzip.compress(parquet(ROWS)), [1, 2]),
    "parquet, upper case, gzip": ("A.PARQUET.GZ", gzip.compress(parquet(ROWS)), [1, 2]),
    "jsonl, upper case": ("A.JSONL", LINES.encode(), [1, 2]),
    "csv, upper case, gzip": ("A.CSV.GZ", gzip.compress("text\n高血压。\nAsthma.".encode()), [2, 3]),
    "txt, GB18030, gzip": ("a.txt.gz", gzip.compress("高血压。\nAsthma.".encode("gb18030")), [1, 2]),
}


@pytest.mark.parametrize(("name", "raw", "lines"), FILES.values(), ids=FILES)
def test_files(tmp_path, name, raw, lines):
    path = tmp_path / name
    path.write_bytes(raw)
    found = list(read_file(path))
    assert [place for place, _ in found] == [f"{path}:{line}" for line in lines]
    assert [{"text": to_document(record)} for _, record in found] == ROWS


WRAPPED = """\
Asthma is a long-term condition in which the airways
are inflamed, so that they tighten and swell at
times. Most people live well with it.

高血压是指血压长期高于正常，多数人没有感觉，所以要
定期测量血压，少吃盐，多运动。

One line.
"""


def test_hard_wrapped_paragraphs_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text(WRAPPED, encoding="utf-8")
    places, found = zip(*read_file(tmp_path / "a.txt"), strict=True)
    assert [place.rpartition(":")[2] for place in places] == ["1", "5", "8"]
    assert [record["text"] for record in found] == [
        "Asthma is a long-term condition in which the airways are inflamed, so that they tighten and swell at times. "
        "Most people live well with it.",
        "高血压是指血压长期高于正常，多数人没有感觉，所以要定期测量血压，少吃盐，多运动。",
        "One line.",
    ]


def test_roles_are_known_in_any_case():
    turns = [{"role": "User", "content": "a"}, {"role": "ASSISTANT", "content": "b"}]
    assert to_conversation({"messages": turns}) == chat(("user", "a"), ("assistant", "b"))
    assert to_prompt({"messages": turns}) == chat(("user", "a"))


def test_an_empty_system_turn_hides_no_system_text():
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    (first, *_) = to_conversation({"system": "Be brief.", "messages": turns})
    assert first == {"role": "system", "content": "Be brief."}


def test_what_is_not_utf8_is_named(tmp_path, messages):
    text = "用Python分析A型和B型血，vitamin维C和T细胞\n"
    (tmp_path / "a.txt").write_text(text, encoding="gb18030")
    assert [record for _, record in read_file(tmp_path / "a.txt")] == [{"text": text}]
    (tmp_path / "b.txt").write_text(text, encoding="gb18030")
    assert [record for _, record in read_file(tmp_path / "b.txt")] == [{"text": text}]
    (said,) = [message for message in messages if "read as GB18030" in message]
    assert "a.txt is not UTF-8, and read as GB18030" in said, "of a folder's files the first is named"


def test_bad_records_of_one_file_do_not_hide_those_of_others():
    bad = [{"place": f"{name}:{line}"} for name, count in (("a", 20), ("b", 1), ("c", 4)) for line in range(count)]
    shown = [row["place"] for row in examples(bad)]
    assert shown == ["a:0", "a:1", "a:2", "a:3", "a:4", "a:5", "b:0", "c:0", "c:1", "c:2"]
    assert examples(bad[:12]) == bad[:10]


@pytest.mark.parametrize(
    "text", ["Schöne Grüsse vom Müller\n", "It’s fine\n", "Die Ärzte müssen für die Behandlung räumen\n", "España\n"]
)
def test_western_text_is_not_read_as_chinese(tmp_path, text):
    (tmp_path / "a.txt").write_text("Hello.\n" + text, encoding="cp1252")
    ((place, error),) = read_file(tmp_path / "a.txt")
    assert place == str(tmp_path / "a.txt") and isinstance(error, BadRecord)
    assert re.match(r"cannot be read: not UTF-8, but likely Windows-1252 .*iconv -f cp1252", str(error))
    with pytest.raises(UserError, match="1 bad records .*\n.*a.txt: cannot be read: not UTF-8"):
        load_texts(tmp_path)


def test_short_chinese_files_are_not_taken_for_damaged_utf8(tmp_path):
    """Two bytes of GB18030 are often a character of UTF-8, too: 4 of 7 here."""
    (tmp_path / "a.txt").write_text("什么是痛风？\n", encoding="gb18030")
    assert [record for _, record in read_file(tmp_path / "a.txt")] == [{"text": "什么是痛风？\n"}]


@pytest.mark.parametrize("damage", ["naïve\n".encode("cp1252"), b"\xe2\x80 cut\n"])
def test_a_damaged_byte_does_not_make_a_file_chinese(tmp_path, damage):
    """Read as GB18030, the quotes of all other lines would be Chinese characters."""
    (tmp_path / "a.txt").write_bytes("It’s the patient’s own history.\n".encode() * 20 + damage)
    ((_, error),) = read_file(tmp_path / "a.txt")
    assert re.match(r"cannot be read: UTF-8 but for some bytes: line 21 holds b'\\xe", str(error))


def test_traditional_chinese_is_not_read_as_simplified(tmp_path):
    text = "question,answer\n感冒了怎麼辦？,多喝水，好好休息。發燒的人要看醫生。\n"
    (tmp_path / "a.csv").write_text(text, encoding="cp950")
    ((_, error),) = read_file(tmp_path / "a.csv")
    assert re.match(r"cannot be read: not UTF-8, but likely Big5: .*iconv -f big5", str(error))
    (tmp_path / "a.csv").write_text(text, encoding="gb18030")
    assert [record["answer"] for _, record in read_file(tmp_path / "a.csv")] == [text.split(",")[-1].strip()]


def test_a_line_that_shows_nothing_is_no_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\xa0\n\u200e\x0c\n\xa0two\n", encoding="utf-8")
    assert [(place[-1], record["text"]) for place, record in read_file(tmp_path / "a.txt")] == [
        ("1", "one\n"),
        ("4", "\xa0two\n"),
    ]


@pytest.mark.parametrize("look", [{"preview": 1}, {"plan": True}])
def test_a_look_leaves_the_list_of_skipped_records(tmp_path, look):
    data = write_texts(tmp_path / "a.jsonl", "one", "two")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bad_records.jsonl").touch()
    DataArguments(data, data, keep_duplicates=True, **look).load_documents(str(tmp_path / "out"))
    assert (tmp_path / "out" / "bad_records.jsonl").exists()
    DataArguments(data, data, keep_duplicates=True).load_documents(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "bad_records.jsonl").exists()


def test_a_plan_lists_no_bad_records(tiny, records, tmp_path):
    data = write_lines(tmp_path / "data" / "sft", [{"prompt": "q"}])
    for folder in (records, data.parent):  # the second holds nothing else
        flags = ("--plan", "--bad_records", "skip", "--train_file_dir", f"{data},{folder}/sft")
        ended = in_process(*stage("sft", tiny("llama"), folder, tmp_path / "out", *flags))
        assert (ended.code, "Skipped" in ended.stderr) == (0 if folder == records else 2, True), ended.stderr
        assert not (tmp_path / "out").exists()


def test_flags_without_effect_are_named(tmp_path, messages):
    data, held_out = write_texts(tmp_path / "a.jsonl", *"abcd"), write_texts(tmp_path / "b.jsonl", "other")
    flags = {"validation_split_percentage": 10, "validation_split_count": 1, "max_source_length": 9}
    DataArguments(data, held_out, dataset_config_name="x", **flags).load_documents()
    named = [message for message in messages if "has no effect" in message]
    expected = "max_source_length", "dataset_config_name", "validation_split_percentage", "validation_split_count"
    assert [message.split()[0] for message in named] == [f"--{name}" for name in expected]
    messages.clear()
    for held_out in (None, data):
        DataArguments(data, held_out, **flags | {"max_source_length": 256}).load_documents()
    assert not any("has no effect" in message for message in messages)


def test_each_line_is_a_question_however_it_ends(tmp_path):
    (tmp_path / "q.txt").write_text("what helps against a cold\nwhat helps against a burn\nand a sprain\n\nand flu\n")
    asked = [messages[-1]["content"] for messages in DataArguments(str(tmp_path)).load_questions()]
    assert asked == ["what helps against a cold", "what helps against a burn", "and a sprain", "and flu"]


@pytest.mark.parametrize(
    "text",
    [
        "One.\nTwo.\nThree.\n",
        "One.\n\nTwo.\n\nThree.\n",
        "A first document, on a line.\nA second one, alike.\n\nA third.\n",
        "x" * 200 + "\n" + "y" * 200 + "\nz\n\nlast\n",
        "no full stop\nnor here\nnor there\n",
    ],
)
def test_documents_of_one_line_stay_apart(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    found = [record["text"].strip() for _, record in read_file(tmp_path / "a.txt")]
    assert found == [line for line in text.split("\n") if line]


def test_csv_cells_hold_turns_and_history(tmp_path):
    turns = json.dumps(QA).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{turns}"\n')
    cells = 'instruction,output,history\nq2,a2,"[[""q1"", ""a1""]]"\n[x,y,\nq,a,[]\nq,"[{""value"": 1}, 2]",\n'
    (tmp_path / "b.csv").write_text(cells)
    first, second, third, fourth, fifth = [
        record for name in "ab" for _, record in read_file(tmp_path / f"{name}.csv")
    ]
    assert to_conversation(first) == QA
    assert to_conversation(second) == Q1A1Q2 + chat(("assistant", "a2"))
    assert to_conversation(third) == chat(("user", "[x"), ("assistant", "y"))
    assert to_conversation(fourth) == QA
    assert to_conversation(fifth)[-1]["content"] == '[{"value": 1}, 2]', "an answer may be JSON"


def test_a_csv_cell_nested_too_deep_stays_text(tmp_path):
    deep = '[{"role":' + "[" * 3000
    (tmp_path / "a.csv").write_text("text\n" + f'"{deep.replace(chr(34), chr(34) * 2)}"\n')
    assert [record for _, record in read_file(tmp_path / "a.csv")] == [{"text": deep}]


def test_csv_rows_with_too_many_cells_are_bad(tmp_path):
    (tmp_path / "a.csv").write_text("text,id\none,1\ntwo,2,3\n")
    (_, good), (place, bad) = read_file(tmp_path / "a.csv")
    assert good == {"text": "one", "id": "1"} and place.endswith("a.csv:3")
    assert "more cells than the 2 columns" in str(bad)


def test_csv_quotes_that_do_not_pair_are_bad_where_they_begin(tmp_path):
    (tmp_path / "a.csv").write_text('text,id\n"one"s,1\n"two\nlines",2\n"three,3\nfour,4\nfive,5\n')
    found = list(read_file(tmp_path / "a.csv"))
    assert [place.rpartition(":")[2] for place, _ in found] == ["2", "4", "5"]
    assert found[1][1] == {"text": "two\nlines", "id": "2"}
    assert re.match("its quotes do not come in pairs .*expected after", str(found[0][1]))
    assert re.match("its quotes do not come in pairs .*; the row reaches to line 7", str(found[2][1]))


def test_files_that_are_not_read_are_named(tmp_path, messages):
    for name in ("b/c.txt", "A.JSONL", "a.md", "b/notes.json.bak", ".DS_Store", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "one"}\n')
    assert len(load_texts(tmp_path)) == 2
    (said,) = {message for message in messages if "not read" in message}
    assert said.startswith("2 files are not read") and f": {tmp_path}/a.md, {tmp_path}/b/notes.json.bak" in said
    assert ".DS_Store" not in said and "config" not in said


def test_hidden_files_are_no_data(tmp_path):
    """Old copies of a notebook's, and what macOS lays beside each file."""
    folder = tmp_path / ".shelf" / "data"  # a hidden folder above is no reason
    for name in ("rows.jsonl", ".ipynb_checkpoints/rows-checkpoint.jsonl", "._rows.jsonl", "._notes.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    assert find_files(str(folder)) == [folder / "rows.jsonl"] and not other_files(str(folder))


def test_folders_are_searched_recursively(tmp_path):
    for name in ("b/c.txt", "a.jsonl", "a.md", "b/d.json.gz", "b/notes.json.bak"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.relative_to(tmp_path).as_posix() for p in find_files(tmp_path)] == ["a.jsonl", "b/c.txt", "b/d.json.gz"]
    assert find_files(tmp_path / "a.jsonl") == [tmp_path / "a.jsonl"]


def test_linked_folders_are_searched_and_loops_are_not(tmp_path):
    train, big = tmp_path / "train", tmp_path / "big"
    for name in (train / "z.jsonl", big / "a.jsonl", big / "deeper" / "b.jsonl"):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    (train / "big").symlink_to(big)
    (big / "deeper" / "back").symlink_to(big)
    (train / "self").symlink_to(train)
    (train / "gone.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert other_files(train) == [train / "gone.jsonl"]
    found = [path.relative_to(train).as_posix() for path in find_files(train)]
    assert found == ["big/a.jsonl", "big/deeper/b.jsonl", "z.jsonl"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir()
    listed = Path.iterdir

    def iterdir(path):
        if path.name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(PermissionError, match="shut"):
        find_files(tmp_path)


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


@pytest.fixture
def messages():
    """What is logged; loguru's does not come to pytest's caplog."""
    found = []
    number = logger.add(lambda message: found.append(message.record["message"]))
    yield found
    logger.remove(number)


def load_texts(folder, **kwargs):
    args = DataArguments(str(folder), str(folder), keep_duplicates=True, **kwargs)
    return args.load_documents()[0]["text"]


def test_bad_records_are_skipped_on_request_and_listed(tmp_path):
    data, output = tmp_path / "data", tmp_path / "output"
    data.mkdir()
    (data / "a.jsonl").write_text('{"text": "one"}\n{"txt": "two"}\n{"text": ""}\n{"text": "four"}\n{oops\n')
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("five\n")
    args = DataArguments(str(data), str(held_out), bad_records="skip")
    assert args.load_documents(str(output))[0]["text"] == ["one", "four"]
    listed = [json.loads(line) for line in (output / "bad_records.jsonl").read_text().splitlines()]
    assert [row["place"] for row in listed] == [f"{data}/a.jsonl:{line}" for line in (2, 3, 5)]
    assert listed[1] == {"place": f"{data}/a.jsonl:3", "reason": "the text is empty", "record": '{"text": ""}'}
    assert "oops" in listed[2]["reason"] and listed[2]["record"] == "{oops"


def test_bad_records_on_one_line_are_told_apart(tmp_path, messages):
    """As json.dump writes an array."""
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in ("one", 2, "three", "", "five")]))
    with pytest.raises(UserError) as refused:
        load_texts(tmp_path)
    assert re.match(r"2 bad records .*\n.*a.json:1, item 2: expected text.*\n.*a.json:1, item 4:", str(refused.value))
    assert load_texts(tmp_path, bad_records="skip") == ["one", "three", "five"]


def write_texts(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_folders_have_weights(tmp_path):
    a, b, c = (write_texts(tmp_path / x / "a.jsonl", *(f"{x}{i}" for i in range(8))) for x in "abc")
    held_out = write_texts(tmp_path / "held_out.jsonl", "other")
    texts = DataArguments(f"{a},{b}:2,{c}:0.5", held_out).load_documents()[0]["text"]
    assert [text for text in texts if text[0] == "a"] == [f"a{i}" for i in range(8)]
    assert sorted(text for text in texts if text[0] == "b") == sorted([f"b{i}" for i in range(8)] * 2)
    assert 1 <= len([text for text in texts if text[0] == "c"]) <= 7
    with pytest.raises(UserError, match="a.jsonl:x: expected a folder, or folder:weight"):
        DataArguments(f"{a}:x", held_out).load_documents()
    for weight in ("-1", "0", "nan", "inf"):
        with pytest.raises(UserError, match=f"a.jsonl:{weight}: the weight is {weight}, expected a number above 0"):
            DataArguments(f"{b},{a}:{weight}", held_out).load_documents()
    with pytest.raises(UserError, match="no such folder of records: nowhere"):
        DataArguments(f"{a},nowhere", held_out).load_documents()
    assert len(DataArguments(a, f"{held_out},{b}").load_documents()[1]) > len(DataArguments(a, b).load_documents()[1])
    with pytest.raises(UserError, match="held-out records have no weights"):
        DataArguments(a, f"{held_out}:2").load_documents()
    with pytest.raises(UserError, match="no training records left"):
        DataArguments(f"{b}:0.0001", held_out).load_documents()


def test_duplicates_and_held_out_records_are_left_out_of_training(tmp_path, messages):
    train = write_texts(tmp_path / "train.jsonl", "one", "two", "one ", "three", "four")
    held_out = write_texts(tmp_path / "held_out.jsonl", "three", "five")
    assert DataArguments(train, held_out).load_documents()[0]["text"] == ["one", "two", "four"]
    told = (
        "Left out of training: 1 duplicates and 1 records that are held out too (--keep_duplicates keeps them)",
        "3 training and 2 held-out records",
    )
    assert all(message in messages for message in told)
    messages.clear()
    kept = DataArguments(train, held_out, keep_duplicates=True).load_documents()[0]["text"]
    assert kept == ["one", "two", "one", "three", "four"]
    assert not any("Left out" in message for message in messages)


def test_long_rows_and_all_kinds_of_files_side_by_side(tmp_path):
    long = "高血压 asthma " * 4000
    assert len(long) == 44_000
    write_texts(tmp_path / "a.jsonl", long, "two")
    (tmp_path / "b.txt").write_text("three\n" + long + "four\n", encoding="utf-8")
    (tmp_path / "c.csv").write_text(f"text\n{long}five\n", encoding="utf-8")
    assert load_texts(tmp_path) == [long.strip(), "two", "three", long + "four", long + "five"]


def test_no_folder_beside_a_hub_data_set_is_not_the_current_one(tmp_path):
    """As the run scripts pass it on: --train_file_dir ''."""
    write_texts(tmp_path / "train.jsonl", "one", "two")
    args = DataArguments("", "", dataset_name=str(tmp_path), validation_split_count=1)
    train, held = args.load_documents()
    assert {*train["text"], *held["text"]} == {"one", "two"}


def test_the_validation_split_of_a_hub_data_set_is_held_out(tmp_path):
    write_texts(tmp_path / "train.jsonl", "a", "b", "c")
    train, held = DataArguments(dataset_name=str(tmp_path), validation_split_count=1).load_documents()
    assert (len(train), len(held)) == (2, 1)
    write_texts(tmp_path / "validation.jsonl", "d", "e")
    train, held = DataArguments(dataset_name=str(tmp_path)).load_documents()
    assert (train["text"][:], held["text"][:]) == (["a", "b", "c"], ["d", "e"])
    with pytest.raises(UserError, match="--dataset_name"):
        DataArguments(dataset_name=str(tmp_path / "nowhere")).load_documents()


def test_a_hub_data_set_whose_files_disagree(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "n": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two", "other": ["x"]}\n')
    with pytest.raises(UserError, match="--dataset_name .*files disagree .*other.*--train_file_dir"):
        DataArguments(dataset_name=str(tmp_path)).load_documents()
    assert sorted(load_texts(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize("array", [False, True])
def test_half_of_a_character_is_a_bad_record(tmp_path, array):
    whole, half = '{"text": "good \\ud83e\\udd27", "kind": "\\ud83d"}', '{"text": "a cold \\ud83e"}'
    unknown = '{"txt \\ud83e": 1}'
    text = f"[{whole},\n{half},\n{unknown}]" if array else f"{whole}\n{half}\n{unknown}\n"
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        load_texts(tmp_path)
    reason = r"half of a character \(\\ud83e, the other half is missing\) behind '.*a cold '"
    assert re.search(rf"a.jsonl:2: {reason}", str(error.value))
    assert re.search(r"a.jsonl:3: expected .*found keys txt \\ud83e", str(error.value))
    assert load_texts(tmp_path, bad_records="skip") == ["good 🤧"]


def test_half_of_a_character_in_a_pair(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD.replace("}", ', "kind": "\\ud83d"}\n') + GOOD.replace('"a"', '"\\udc00"'))
    args = DataArguments(str(tmp_path), str(tmp_path), keep_duplicates=True, bad_records="skip")
    (pair,) = args.load_pairs()[0]
    assert pair["kind"] == "\\ud83d"


def test_rows_just_made_and_from_the_cache_have_one_fingerprint(tmp_path):
    """By it their tokens are cached: a second run, and other ranks, would tokenize again."""
    for name in "ab":
        write_lines(tmp_path / name, [{"instruction": f"{name}{i} {tmp_path}", "output": "a"} for i in range(4)])
    for folders in (str(tmp_path / "a"), f"{tmp_path}/a,{tmp_path}/b:2"):
        first, again = (DataArguments(folders, str(tmp_path / "b")).load_conversations() for _ in range(2))
        assert [rows._fingerprint for rows in first] == [rows._fingerprint for rows in again]
        assert first[0]._fingerprint != first[1]._fingerprint


def test_held_out_files_among_those_of_training_are_named(tmp_path, messages):
    names = "train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl", "dev/a.jsonl", "validators.jsonl"
    for number, name in enumerate(names):
        write_lines((tmp_path / "d" / name).parent, [{"text": f"a{number}"}], Path(name).name)
    DataArguments(str(tmp_path / "d"), validation_split_count=1).load_documents()
    (found,) = [message for message in messages if "are trained on" in message]
    assert found.startswith("2 files") and "dev/a.jsonl" in found
    messages.clear()
    DataArguments(str(tmp_path / "d" / "dev"), str(tmp_path / "d" / "test-00000-of-00001.jsonl")).load_documents()
    assert not any("are trained on" in message for message in messages)


def test_the_training_folder_as_validation_folder_holds_out_a_share(tmp_path):
    data = write_texts(tmp_path / "a.jsonl", *(f"text {i}" for i in range(10)))
    train, held_out = DataArguments(data, data, validation_split_count=3).load_documents()
    assert len(train) == 7 and len(held_out) == 3
    assert not set(train["text"]) & set(held_out["text"])


def test_pairs_on_one_question_are_held_out_together(tmp_path):
    def pair(question, number):
        return {"question": f"q{question}", "response_chosen": f"good {number}", "response_rejected": "bad"}

    def write(pairs):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    write(pair(question, number) for number in range(4) for question in range(25))
    train, held_out = DataArguments(str(tmp_path), validation_split_count=10).load_pairs()
    asked = [{row["prompt"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert not asked[0] & asked[1] and len(asked[0]) == 22
    assert (len(train), len(held_out)) == (88, 12)  # three whole questions are the fewest that hold ten pairs

    write(pair(0, number) for number in range(20))
    with pytest.raises(UserError, match="all 20 are on 1 question.*--validation_file_dir"):
        DataArguments(str(tmp_path)).load_pairs()


def test_pairs_alike_but_for_their_kind_are_duplicates(tmp_path):
    pair = {"question": "q", "response_chosen": "good", "response_rejected": "bad"}
    rows = [pair | {"kind": "short"}, pair | {"kind": "rude"}, pair | {"response_rejected": "worse"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held_out.jsonl").write_text(json.dumps(pair | {"question": "other"}))
    train, _ = DataArguments(str(tmp_path / "train.jsonl"), str(tmp_path / "held_out.jsonl")).load_pairs()
    assert train["rejected"][:] == ["bad", "worse"]


def test_a_changed_file_is_read_anew_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    import arguments.rows

    calls = []
    read = arguments.rows.read_file
    monkeypatch.setattr(arguments.rows, "read_file", lambda path, **how: calls.append(path) or read(path, **how))
    data, held_out = write_texts(tmp_path / "a.jsonl", "one"), write_texts(tmp_path / "b.jsonl", "other")
    for text, count in (("one", 2), ("one", 2), ("two", 3)):
        write_texts(tmp_path / "a.jsonl", text)
        assert DataArguments(data, held_out).load_documents()[0]["text"] == [text]
        assert len(calls) == count
    DataArguments(data, held_out, overwrite_cache=True).load_documents()
    assert len(calls) == 5
    other = SimpleNamespace(getsource=lambda module: "of another version", getmodule=inspect.getmodule)
    monkeypatch.setattr(arguments.rows, "inspect", other)
    DataArguments(data, held_out).load_documents()
    assert len(calls) == 7


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


def test_records_may_spread_over_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('\n{\n "text": "one"\n}\n{\n "text": "two"\n}, {"text": "three"}\n')
    assert list(read_file(path)) == [
        (f"{path}:{line}", {"text": text}) for line, text in ((2, "one"), (5, "two"), (7, "three"))
    ]
    path.write_text('{\n "text": "one"\n}\n{\n "text": "two\n')
    *whole, (place, error) = read_file(path)
    assert len(whole) == 1 and place == f"{path}:5" and str(error).startswith("not JSON")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('{"text":\n"one"}\n{"text":\n"two"}\n', [1, 3]),
        ('{ "text": "one",\n"id": 1}, {"text": "two"}', [1, 2]),
        ('{"turns": [\n{"role": "user"},\n{"role": "assistant"}],\n"text": "one"}\n{"text": "two"}', [1, 5]),
        ('\n[{"text": "one"},\n{"text": "two"}]\n', [2, 3]),
    ],
)
def test_a_record_may_begin_on_the_line_of_its_brace(tmp_path, text, lines):
    (tmp_path / "a.json").write_text(text)
    places, found = zip(*read_file(tmp_path / "a.json"), strict=True)
    assert [record["text"] for record in found] == ["one", "two"]
    assert [int(place.rpartition(":")[2].partition(",")[0]) for place in places] == lines


def test_a_line_break_within_a_text_does_not_hide_the_other_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ze\nro"}\n{"text": "one"}\n{"text": "two"}\n')
    assert load_texts(tmp_path, bad_records="skip") == ["one", "two"]


def test_an_array_in_the_first_line_does_not_hide_the_others(tmp_path):
    (tmp_path / "a.jsonl").write_text('["zero"]\n{"text": "one"}\n{"text": "two"}\n')
    assert load_texts(tmp_path, bad_records="skip") == ["one", "two"]


def test_a_line_that_cannot_be_read_is_found_in_its_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{oops\n{"text": "three"}\n')
    places, found = zip(*read_file(path), strict=True)
    assert places == (f"{path}:1", f"{path}:2", f"{path}:3")
    assert isinstance(found[1], BadRecord)
    assert re.fullmatch(r"not JSON \(.*column 2.*\): \{oops", str(found[1])) and found[1].raw == "{oops"
    assert (found[0], found[2]) == ({"text": "one"}, {"text": "three"})


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([253402300800], pyarrow.timestamp("s")),  # the year 10000
        pyarrow.array([0], pyarrow.timestamp("s", "No/Where")),
        pyarrow.array([b"\xff"]).view(pyarrow.string()),
    ],
)
def test_a_parquet_with_values_that_python_lacks_is_a_bad_file(tmp_path, column):
    table = pyarrow.table({"text": ["one"], "other": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: cannot be read: Python has no such value .*leave it out"):
        load_texts(tmp_path)


CUT = b'[{"text": "one"},\n{"text": "two"}'
BROKEN = {  # the records read before the break, the place and the words of the bad one
    "cut.json": (CUT, ["one", "two"], ":2", r"not JSON .*; the rest is not read"),
    "behind.json": (CUT + b']\n{"text": "three"}', ["one", "two"], ":3", "text after the array's end: "),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-12], [], "", "cannot be read: "),
    "damaged.jsonl.gz": (gzip.compress(LINES.encode())[:10] + b"\xff" * 20, [], "", "cannot be read: "),
    "no.jsonl.gz": (LINES.encode(), [], "", "cannot be read: "),
    "no_encoding.jsonl": (
        LINES.encode() + b'{"text": "\xff\xff"}\n',
        [],
        "",
        r"cannot be read: neither UTF-8 nor GB18030 text: line 3 holds b'\\xff'",
    ),
    "no_gb.txt": (
        "高血压。\n".encode("gb18030") * 2 + b"\x81\n",
        [],
        "",
        r"cannot be read: neither UTF-8 nor GB18030 text: line 3 holds b'\\x81'",
    ),
    "cut_character.txt": (
        b"x" * (1 << 20) + b"\n\xe9",
        [],
        "",
        r"cannot be read: neither UTF-8 nor GB18030 text: line 2 holds b'\\xe9'",
    ),
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


def test_an_answer_that_no_prompt_shows_is_not_judged():
    learned_no_more = QA[1] | {"weight": 0, "reasoning_content": "why"}
    assert to_prompt({"messages": [QA[0], learned_no_more, learned_no_more], "tools": "null"}) == [QA[0]]
    with pytest.raises(BadRecord, match="there is no question"):
        to_prompt({"messages": [learned_no_more]})
