"""scripts/quiz.py and scripts/perplexity.py against the plain way to compute the same."""

import json
import math
import shutil

import pytest
import torch
from conftest import in_process, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

from scripts.quiz import PROMPTS, choice, load_quiz

TEXTS = ["The train left at six in the morning.", "老街的尽头有一家修表铺。", "Bread needs an hour to cool."]
OPTIONS = {
    "en": ["The heart", "The heart and the lungs", "A kidney", "心脏"],
    "zh": ["心", "心脏", "肺", "肾脏"],
    "numbers": ["5", "50", "500"],  # the first is the start of all
    "alike": ["The left lung", "The left ventricle of the heart"],  # what they share counts for the bytes of both
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_perplexity_counts_every_token_once(family, tiny, tmp_path):
    write_lines(tmp_path / "general", [{"text": text} for text in TEXTS])
    found = json.loads(in_process("scripts/perplexity.py", tmp_path / "general", tiny(family)).ok().stdout)
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    tokenizer, losses = AutoTokenizer.from_pretrained(tiny(family)), []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        losses += [model(ids, labels=ids).loss.item()] * (ids.shape[1] - 1)
    assert found[str(tiny(family))]["tokens"] == len(losses)
    expected = math.exp(sum(losses) / len(losses))
    assert found[str(tiny(family))]["perplexity"] == pytest.approx(expected, rel=0.01)  # bfloat16 where it is native


def test_general_text_comes_in_any_form(tiny, tmp_path):
    (tmp_path / "general.txt").write_text("\n".join(TEXTS) + "\n", "utf-8")
    found = json.loads(in_process("scripts/perplexity.py", tmp_path, tiny("llama")).ok().stdout)
    write_lines(tmp_path / "general", [{"text": text} for text in TEXTS])
    assert found == json.loads(in_process("scripts/perplexity.py", tmp_path / "general", tiny("llama")).ok().stdout)
    ended = in_process("scripts/perplexity.py", tmp_path / "missing", tiny("llama"))
    assert ended.code == 2 and "missing" in ended.errors[0]


@pytest.mark.parametrize("family", ["llama", "bloom"])  # bloom has no number of positions
def test_of_a_long_text_the_first_tokens_count(family, tiny, tmp_path):
    write_lines(tmp_path / "long", [{"text": TEXTS[0] * 300}])
    write_lines(tmp_path / "cut", [{"text": TEXTS[0] * 200}])
    found = [
        in_process("scripts/perplexity.py", tmp_path / name, tiny(family)).ok().stdout for name in ("long", "cut")
    ]
    tokens = json.loads(found[0])[str(tiny(family))]["tokens"]
    assert found[0] == found[1] and tokens == (2047 if family == "bloom" else 1023)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mamba"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_likeliest_option_per_byte_is_chosen(kind, family, tiny):
    options, language = OPTIONS[kind], kind if kind in PROMPTS else "en"
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    if family == "mamba":  # has no cache that could be shared between the options
        torch.manual_seed(0)
        size = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=400, **size)).eval()
    tokenizer, prompt = AutoTokenizer.from_pretrained(tiny("llama")), PROMPTS[language].format("What pumps blood?")
    likelihoods = []
    for option in options:
        ids, start = tokenizer(prompt + option, return_tensors="pt")["input_ids"], len(tokenizer(prompt)["input_ids"])
        logp = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
        likelihoods.append(logp[start - 1 :].sum().item() / len(option.encode()))
    assert choice(model, tokenizer, prompt, options) == likelihoods.index(max(likelihoods))


def test_lines_end_at_line_breaks_alone(tiny, tmp_path):
    """JSON leaves the other characters raw that str.splitlines breaks at."""
    row = {"question": "What\u2028pumps\x85blood?", "options": ["The\u2029heart", "A kidney"], "answer": 0}
    write_lines(tmp_path, [row, row], "fr.jsonl")
    with (tmp_path / "fr.jsonl").open("a") as file:
        file.write("\n")
    found = json.loads(in_process("scripts/quiz.py", tmp_path, tiny("llama")).ok().stdout)
    assert found[str(tiny("llama"))]["questions"] == 2


def test_a_text_of_one_token_predicts_nothing(tiny, tmp_path):
    write_lines(tmp_path, [{"text": "a"}])
    ended = in_process("scripts/perplexity.py", tmp_path, tiny("llama"))
    assert ended.code == 2 and "no text has two tokens" in ended.errors[0]
    write_lines(tmp_path, [{"text": "a"}, {"text": "asthma and influenza"}])
    found = json.loads(in_process("scripts/perplexity.py", tmp_path, tiny("llama")).ok().stdout)
    assert found[str(tiny("llama"))]["tokens"] > 0


GOOD = {"question": "What pumps blood?", "options": ["The heart", "A kidney"], "answer": 0}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "What', "en.jsonl:2: not JSON"),
        ("[]", "en.jsonl:2: expected"),
        (json.dumps(GOOD | {"answer": 2}), "en.jsonl:2: expected"),
        (json.dumps(GOOD | {"answer": -1}), "en.jsonl:2: expected"),
        (json.dumps(GOOD | {"answer": "0"}), "en.jsonl:2: expected"),
        (json.dumps(GOOD | {"options": ["one"]}), "en.jsonl:2: expected"),
        (json.dumps(GOOD | {"options": ["one", ""]}), "en.jsonl:2: expected"),
    ],
)
def test_a_line_that_is_no_question_is_named(line, said, tiny, tmp_path):
    (tmp_path / "en.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    ended = in_process("scripts/quiz.py", tmp_path, tiny("llama"))
    assert ended.code == 2 and len(ended.errors) == 1 and said in ended.errors[0] and ended.stdout == ""


def test_a_quiz_from_windows_and_an_empty_one(tiny, tmp_path):
    (tmp_path / "en.jsonl").write_text(json.dumps(GOOD) + "\r\n", "utf-8-sig")
    found = json.loads(in_process("scripts/quiz.py", tmp_path, tiny("llama")).ok().stdout)
    assert found[str(tiny("llama"))]["questions"] == 1
    (tmp_path / "zh.jsonl").write_text("\n")
    ended = in_process("scripts/quiz.py", tmp_path, tiny("llama"))
    assert ended.code == 2 and "zh.jsonl holds no questions" in ended.errors[0]


def test_a_file_that_is_not_asked_is_named(tmp_path, capsys):
    write_lines(tmp_path, [GOOD], "en.jsonl")
    (tmp_path / "law.csv").write_text("question,options,answer\n")
    assert load_quiz(tmp_path) == {"en": [GOOD]}
    assert f"not read, only .jsonl files are: {tmp_path / 'law.csv'}" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["quiz", "perplexity"])
def test_what_is_judged_is_looked_at_first(script, tiny, tmp_path):
    write_lines(tmp_path / "data", [GOOD | {"text": "asthma and influenza"}])
    bare = shutil.copytree(tiny("llama"), tmp_path / "bare")
    for file in bare.glob("token*"):
        file.unlink()
    cases = {
        "expected a folder and models": (),
        "expected a folder and models: ": (tmp_path / "data",),
        "nowhere is not a model": (tmp_path / "data", tiny("llama"), "nowhere"),
        "no tokenizer in": (tmp_path / "data", bare),
        "missing": (tmp_path / "missing", tiny("llama")),
    }
    for said, words in cases.items():
        ended = in_process(f"scripts/{script}.py", *words)
        assert ended.code == 2 and len(ended.errors) == 1 and said in ended.errors[0] and ended.stdout == ""
        assert f"for {tiny('llama')}" not in ended.stderr, "nothing was judged"


def test_a_folder_without_questions(tiny, tmp_path):
    ended = in_process("scripts/quiz.py", tmp_path / "none", tiny("llama"))
    assert ended.code == 2 and "none holds no .jsonl file of questions" in ended.stderr
