"""The figures of --preview, against ones worked out by hand."""

import numpy as np
from conftest import in_process, stage
from datasets import Dataset
from transformers import AutoTokenizer

from arguments.data import DataArguments
from arguments.preview import histogram, limits_table, preview
from supervised_finetuning import build_dataset


class Letters:
    """Token 1 is a, 2 is b ..."""

    def decode(self, ids):
        return "".join(chr(96 + token) for token in ids)


# Two rows of 4 and 6 tokens, of which 1 and 3 are trained: 40%
ROWS = [
    {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4], "source_tokens": 3, "source_kept": 3},
    {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, -100, -100, 5, 6], "source_tokens": 197, "source_kept": 57},
]
WHOLE = """\
--- record 1, input_ids: 4 tokens, 1 trained
abc[[d]]

2 records, 10 tokens, 40.0% of them trained

tokens, records
4 - 5  ######################################## 1
5 - 6   0
6 - 6  ######################################## 1

source_tokens: 100 on average, 197 at most
 max_source_length  records cut     tokens lost
                64        50.0%           70.0%  <- now
               128        50.0%  at least 34.5%
               256         0.0%            0.0%"""


def test_the_whole_page_for_two_rows():
    """Of 200 source tokens 60 are kept, where the limit alone would take 197 - 64 = 133; 128 takes 69."""
    assert preview(Dataset.from_list(ROWS), Letters(), 1, 64, 32) == WHOLE


def test_histogram():
    lines = histogram(np.array([10] * 8 + [11] * 4 + [110])).splitlines()
    assert lines[1] == " 10 -  20  " + "#" * 40 + " 12" and lines[-1] == "100 - 110  ### 1" and len(lines) == 11


def test_limits_of_answers_are_exact():
    """Answers of 100 and 300 tokens: 64 loses 36 + 236 of 400, 256 loses 44."""
    lines = limits_table("target_tokens", np.array([100, 300]), "max_target_length", 512).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["64", "100.0%", "68.0%"],
        ["128", "50.0%", "43.0%"],
        ["256", "50.0%", "11.0%"],
        ["512", "0.0%", "0.0%", "<-", "now"],
    ]


def test_kept_tokens_count_whole_exchanges(tiny):
    """A conversation one token too long loses its first exchange: what was kept is told, in SFT's rows and RL's."""
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    turns = [("user", "one " * 9), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = Dataset.from_list([{"messages": messages}])
    (whole,) = build_dataset(rows, tokenizer, DataArguments("unused"))
    assert whole["source_kept"] == whole["source_tokens"]
    args = DataArguments("unused", max_source_length=whole["source_tokens"] - 1)
    (cut,) = build_dataset(rows, tokenizer, args)
    later = len(DataArguments("unused").encode_prompt(tokenizer, messages[2:3])["input_ids"])
    assert (cut["source_tokens"], cut["source_kept"]) == (whole["source_tokens"], later)
    prompt = args.encode_prompt(tokenizer, messages[:3])
    assert (prompt["source_tokens"], prompt["source_kept"]) == (whole["source_tokens"], later)


def test_packing_is_told(tiny, records, tmp_path):
    flags = ("--preview", 1, "--packing", "--packing_length", 512)
    shown = in_process(*stage("sft", tiny("llama"), records, tmp_path / "out", *flags)).ok().stdout
    told = shown.splitlines()[0]
    tokens = int(shown.partition(" records, ")[2].partition(" tokens")[0].replace(",", ""))
    rows = -(-tokens // 512)
    assert told == f"--packing makes {rows} rows of 512 tokens, {tokens / rows / 512:.1%} full, of the records below."
