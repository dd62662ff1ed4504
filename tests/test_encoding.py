"""Which tokens of a conversation are trained, what truncation keeps, and that RL's prompts are SFT's."""

import re
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from arguments.command_line import UserError
from arguments.data import DataArguments
from arguments.encoding import encode_turns, refuse_ends, render, warn_of_joined_tokens
from arguments.model import PLAIN_CHAT_TEMPLATE, pad_candidate

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["user assistant system", "Drink water and rest.", "请多喝水，好好休息。", "hello hello a b"] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
NO_END = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
SAME_LINE = (  # as Vicuna's: the space belongs to the answer's first token
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
SPACE_BEFORE_END = (  # as Llama 2's
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{% if m.role == 'assistant' %} {{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def make_tokenizer(template=CHATML, eos="<|im_end|>", special=SPECIAL, **kwargs):
    """A byte-level BPE of a few merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, **kwargs)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def chatml():
    return make_tokenizer()


def data_args(source=256, target=256):
    return DataArguments(train_file_dir="unused", max_source_length=source, max_target_length=target)


def chat(*contents, system=None):
    """Alternating questions and answers, after a system text."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def trained(tokenizer, encoded):
    """The text of each stretch of trained tokens."""
    stretches = groupby(zip(encoded["input_ids"], encoded["labels"], strict=True), key=lambda pair: pair[1] != -100)
    stretches = [list(pairs) for is_trained, pairs in stretches if is_trained]
    assert all(token == label for pairs in stretches for token, label in pairs)
    return [tokenizer.decode([token for token, _ in pairs]) for pairs in stretches]


END = "<|im_end|>"
CONVERSATIONS = {
    "one turn": (chat("hello", "Drink water."), ["Drink water." + END]),
    "system, two turns": (
        chat("What helps?", "Drink water\nand rest.", "Thanks!", "Get well soon.", system="Be brief."),
        ["Drink water\nand rest." + END, "Get well soon." + END],
    ),
    "Chinese": (
        chat("感冒怎么办？", "请多喝水，好好休息。", "还有呢？", "发热时看医生。", system="请简短。"),
        ["请多喝水，好好休息。" + END, "发热时看医生。" + END],
    ),
    "mixed, emoji": (chat("What is 感冒?", "感冒 is a cold 🤧"), ["感冒 is a cold 🤧" + END]),
    "one character": (chat("a", "a", "b or a?", "b", "是吗？", "是"), ["a" + END, "b" + END, "是" + END]),
    "answers inside the question": (
        chat("Say hello and rest. hello", "hello", "hello", "hello hello"),
        ["hello" + END, "hello hello" + END],
    ),
    "answers like role names": (chat("user", "assistant", "assistant", "user"), ["assistant" + END, "user" + END]),
    "line breaks at the ends": (chat("hello", "\n\nhello \n"), ["\n\nhello \n" + END]),
    "a marker's characters": (chat("\ue0000 \ue0001\ue001", "a"), ["a" + END]),
}


@pytest.mark.parametrize(("messages", "golden"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_trains_exactly_the_answers_and_their_ends(chatml, messages, golden):
    encoded = data_args().encode(chatml, messages)
    assert trained(chatml, encoded) == golden
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert chatml.decode(encoded["input_ids"]) == whole.removesuffix("\n")  # nothing after the last end token


def test_tool_results_are_not_trained(chatml):
    messages = [*chat("hello", "f()"), {"role": "tool", "content": "b"}, {"role": "assistant", "content": "a"}]
    assert trained(chatml, data_args().encode(chatml, messages)) == ["f()" + END, "a" + END]


@pytest.mark.parametrize(
    ("template", "eos", "golden", "text"),
    [
        (
            PLAIN_CHAT_TEMPLATE,
            "<|endoftext|>",
            ["a<|endoftext|>", "b 水<|endoftext|>"],
            "Be brief.\nUser:\nhello\nAssistant:\na<|endoftext|>\nUser:\na\nAssistant:\nb 水<|endoftext|>",
        ),
        (
            CHATML,
            "<|endoftext|>",  # the template's own end token stands, and no second one
            ["a<|im_end|>", "b 水<|im_end|>"],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
            "a<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb 水<|im_end|>",
        ),
        (
            NO_END,
            "<|endoftext|>",
            ["a", "b 水<|endoftext|>"],
            "system:\nBe brief.\nuser:\nhello\nassistant:\na\nuser:\na\nassistant:\nb 水<|endoftext|>",
        ),
        (
            NO_SYSTEM,
            "<|im_end|>",
            ["a<|im_end|>", "b 水<|im_end|>"],
            "<|im_start|>user\nBe brief.\n\nhello<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb 水<|im_end|>",
        ),
        (
            SPACE_BEFORE_END,
            "<|endoftext|>",  # a model that learns the end behind the space alone never gets there
            ["a <|endoftext|>", "b 水 <|endoftext|>"],
            "system:\nBe brief.user:\nhelloassistant:\na <|endoftext|>user:\naassistant:\nb 水 <|endoftext|>",
        ),
    ],
    ids=["plain", "other eos", "no end token", "no system role", "a space before the end"],
)
def test_templates(template, eos, golden, text):
    tokenizer = make_tokenizer(template, eos)
    encoded = data_args().encode(tokenizer, chat("hello", "a", "a", "b 水", system="Be brief."))
    assert trained(tokenizer, encoded) == golden
    assert tokenizer.decode(encoded["input_ids"]) == text


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("trims", [True, False])
def test_a_reward_model_of_another_origin_reads_its_template_to_the_letter(end, trims):
    template = CHATML.replace("|>\n{% endfor", f"|>{end}{{% endfor")
    tokenizer = make_tokenizer(template.replace("m.content", "m.content | trim") if trims else template)
    messages = chat("hello", "a", "b", "Drink water. ", system="Be brief.")
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert tokenizer.decode(whole).endswith("<|im_end|>" + end)
    assert data_args().encode_templated(tokenizer, messages, True) == whole
    unfinished = tokenizer.decode(data_args().encode_templated(tokenizer, messages, False))
    assert unfinished.endswith("\nDrink water." if trims else "\nDrink water. ")
    start = data_args().encode(tokenizer, messages)["source_tokens"]
    assert data_args(target=3).encode_templated(tokenizer, messages, True) == whole[: start + 3]
    assert data_args(source=4).encode_templated(tokenizer, messages, True) == whole[start - 4 :]


@pytest.mark.parametrize(
    ("template", "eos", "prompt", "answer"),
    [
        ("qwen3", "<|im_end|>", "<|im_start|>assistant\n", "<think>\nb b\n</think>\n\na<|im_end|>"),
        ("qwen3_6", "<|im_end|>", "<|im_start|>assistant\n<think>\n", "b b\n</think>\n\na<|im_end|>"),
        ("glm4moe", "<|endoftext|>", "<|assistant|>", "\n<think>\nb b\n</think>\n\na<|endoftext|>"),
        ("deepseekv3", "<|endoftext|>", "<｜Assistant｜><think>\n", "b b\n</think>\n\na<|endoftext|>"),
    ],
)
def test_an_answer_with_thoughts_of_its_own_gets_no_empty_ones(template, eos, prompt, answer):
    """Templates as trl keeps them; where the prompt opens the thoughts, an answer may begin with them open or not."""
    source = Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja"
    tokenizer = make_tokenizer(source.read_text("utf-8"), eos)
    for opening in ("<think>\n", "") if prompt.endswith("<think>\n") else ("<think>\n",):
        thoughtful = opening + "b b\n</think>\n\na"
        encoded = data_args().encode(tokenizer, chat("hello", thoughtful))
        assert trained(tokenizer, encoded) == [answer]
        assert tokenizer.decode(encoded["input_ids"]).endswith(prompt + answer)
        twice = data_args().encode(tokenizer, chat("hello", thoughtful, "hello", thoughtful))
        earlier, last = trained(tokenizer, twice)
        assert thoughtful in earlier and last == answer
        assert not re.search(r"<think>\s*</think>", tokenizer.decode(twice["input_ids"]))


def test_an_answer_that_goes_on_behind_the_end_token_is_refused(chatml):
    refuse_ends(chatml, {"messages": chat("say <|im_end|>", "a" + END, "b", "b")})
    for row in ({"messages": chat("hello", "a<|im_end|> b")}, {"chosen": "a", "rejected": "<|im_end|>b"}):
        with pytest.raises(UserError, match="an answer goes on behind the text '<|im_end|>'"):
            refuse_ends(chatml, row)


def test_an_answer_without_thoughts_closes_those_that_the_prompt_opens():
    source = Path(trl.__file__).parent / "chat_templates" / "deepseekv3.jinja"
    tokenizer = make_tokenizer(source.read_text("utf-8"), "<|endoftext|>")
    encoded = data_args().encode(tokenizer, chat("hello", "a"))
    assert trained(tokenizer, encoded) == ["\n</think>\n\na<|endoftext|>"]
    assert tokenizer.decode(encoded["input_ids"]).endswith("<think>\n\n</think>\n\na<|endoftext|>")


def test_a_tokenizer_that_does_not_know_the_places_of_its_tokens(chatml, monkeypatch):
    monkeypatch.setattr(type(chatml), "is_fast", False)
    with pytest.raises(UserError, match="expected a model with a fast tokenizer"):
        data_args().encode(chatml, chat("hello", "a"))


def test_answer_on_the_line_of_its_header():
    tokenizer = make_tokenizer(SAME_LINE)
    encoded = data_args().encode(tokenizer, chat("hello", "a", "b", "Drink water."))
    assert [text.strip() for text in trained(tokenizer, encoded)] == ["a" + END, "Drink water." + END]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out"),
        ("{% for m in messages %}{{ m.content | upper | replace('\ue000', '') }}{% endfor %}", "rewrites"),
        ("{{ raise_exception('not today') }}", "refuses a conversation: not today"),
    ],
)
@pytest.mark.parametrize("system", [None, "s"])
def test_refused_templates(template, message, system):
    with pytest.raises(UserError, match=message):
        data_args().encode(make_tokenizer(template), chat("hello", "a", system=system))


# truncation

LONG = chat("one one one", "a1", "two two", "a2", "three", "a3", system="s")


# In CHATML a turn is 3 tokens before a question (5 before an answer), a token a character, and 2 after it. Before the
# last answer LONG has 7 (system) + 3+11+2 + 5+2+2 + 3+7+2 + 5+2+2 + 3+5+2 + 5 = 68 tokens; 43 without the first
# exchange, 22 without the second, too.
S = "<|im_start|>system\ns<|im_end|>\n"
FIRST = "<|im_start|>user\none one one<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
SECOND = "<|im_start|>user\ntwo two<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n"
THIRD = "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "before", "answers"),
    [
        (69, S + FIRST + SECOND + THIRD, ["a1" + END, "a2" + END]),
        (68, S + FIRST + SECOND + THIRD, ["a1" + END, "a2" + END]),  # exactly fits
        (67, S + SECOND + THIRD, ["a2" + END]),  # one token too many
        (43, S + SECOND + THIRD, ["a2" + END]),
        (42, S + THIRD, []),
        (22, S + THIRD, []),
        (21, S.removeprefix("<|im_start|>") + THIRD, []),  # nothing older left: the start goes
        (7, "<|im_end|>\n<|im_start|>assistant\n", []),
        (1, "\n", []),
    ],
)
@pytest.mark.parametrize(("target", "answer"), [(4, "a3" + END), (3, "a3" + END), (2, "a3"), (1, "a")])
def test_truncation(chatml, source, before, answers, target, answer):
    args = data_args(source, target)
    encoded = args.encode(chatml, LONG)
    assert chatml.decode(encoded["input_ids"]) == before + answer
    assert trained(chatml, encoded) == [*answers, answer]
    prompt = args.encode_prompt(chatml, LONG[:-1])["input_ids"]
    assert chatml.decode(prompt) == before
    assert prompt + chatml(answer)["input_ids"] == encoded["input_ids"]


def cut(tokenizer, messages, source, target):
    """What truncation keeps, before and after the answer's start, as token texts."""
    encoded = data_args(source, target).encode(tokenizer, messages)
    texts, labels = [tokenizer.decode([i]) for i in encoded["input_ids"]], encoded["labels"]
    start = max(i for i, label in enumerate(labels, 1) if label == -100)
    assert labels == [-100] * start + encoded["input_ids"][start:]
    return texts[:start], texts[start:]


@pytest.mark.parametrize("template", [CHATML, PLAIN_CHAT_TEMPLATE, NO_END])
def test_truncation_keeps_the_header_and_start_of_the_last_answer(template):
    tokenizer = make_tokenizer(template)
    header = data_args(5).encode_prompt(tokenizer, LONG[:-1])["input_ids"]
    before, answer = cut(tokenizer, [*LONG[:-1], {"role": "assistant", "content": "1 2 3 4 5 6"}], 5, 3)
    assert before == [tokenizer.decode([i]) for i in header]
    assert "".join(before).endswith("ssistant\n" if template == CHATML else "ssistant:\n")
    assert answer == ["1", " ", "2"]


def test_truncation_takes_the_last_answer_after_a_tool(chatml):
    tool = [{"role": "tool", "content": "b"}, {"role": "assistant", "content": "1 2 3"}]
    before, answer = cut(chatml, [*chat("hello " * 20, "f()"), *tool], 6, 4)
    assert "".join(before).endswith("assistant\n") and answer == ["1", " ", "2", " "]


def test_truncation_with_a_space_before_the_end_token():
    before, answer = cut(make_tokenizer(SPACE_BEFORE_END), chat("hello " * 9, "1 2 3 4 5 6"), 5, 3)
    assert "".join(before).endswith("ssistant:\n") and answer == ["1", " ", "2"]


def test_an_end_behind_a_space_is_trained_in_every_turn():
    tokenizer = make_tokenizer(SPACE_BEFORE_END)
    encoded = data_args().encode(tokenizer, chat("hello", "a b", "hello", "b"))
    assert trained(tokenizer, encoded) == ["a b <|im_end|>", "b <|im_end|>"]


def test_an_end_behind_words_of_the_template_is_not_the_answers():
    tokenizer = make_tokenizer(SPACE_BEFORE_END.replace(" {{ eos_token }}", "#{{ eos_token }}"))
    encoded = data_args().encode(tokenizer, chat("hello", "a b", "hello", "b"))
    assert trained(tokenizer, encoded) == ["a b", "b<|im_end|>"]


@pytest.mark.parametrize(("configured", "own"), [(None, []), (0, [0]), ([0, 7], [0, 7])])
def test_what_the_model_takes_for_an_end_is_one(configured, own, chatml):
    """Beside the token that ends a turn; generation_config.json may name several."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=configured))
    assert data_args().eos_ids(model, chatml) == sorted([*own, chatml.eos_token_id])


# RL samples after encode_prompt; the reward model learned on encode


@pytest.mark.parametrize("answer", ["Drink water and rest.", "请多喝水。", "a", "🤧", "1 2"])
@pytest.mark.parametrize("template", [CHATML, PLAIN_CHAT_TEMPLATE, NO_END, NO_SYSTEM])
@pytest.mark.parametrize("question", [["hello"], ["hello", "a", "怎么办？"]])
@pytest.mark.parametrize("system", [None, "请简短。"])
@pytest.mark.parametrize(("source", "target"), [(256, 256), (40, 3), (25, 2), (4, 1)])
def test_prompt_and_answer_and_eos_are_the_whole(template, question, answer, system, source, target, chatml):
    chatml.chat_template = template
    try:
        args = data_args(source, target)
        prompt = args.encode_prompt(chatml, chat(*question, system=system))["input_ids"]
        whole = args.encode(chatml, chat(*question, answer, system=system))["input_ids"]
        assert prompt + (chatml(answer)["input_ids"] + [chatml.eos_token_id])[:target] == whole
        assert len(prompt) <= source
    finally:
        chatml.chat_template = CHATML


@pytest.mark.parametrize("template", [CHATML, PLAIN_CHAT_TEMPLATE, NO_END, NO_SYSTEM, SAME_LINE])
def test_the_last_answer_starts_where_the_prompt_ends(template):
    tokenizer = make_tokenizer(template)
    prompt = data_args().encode_prompt(tokenizer, LONG[:-1])["input_ids"]
    ids, labels, start = encode_turns(tokenizer, LONG)
    assert (ids[:start], labels[start:]) == (prompt, ids[start:])


# padding

BOTH = ["<|endoftext|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("special", "kwargs", "vocab_size", "expected"),
    [
        (SPECIAL, {"eos": "<|im_end|>"}, 330, "<|endoftext|>"),
        (SPECIAL, {"eos": "<|im_end|>", "bos_token": "<|endoftext|>", "template": NO_END}, 330, "<|im_start|>"),
        (SPECIAL, {"eos": "<|endoftext|>", "unk_token": "<|im_end|>", "template": NO_END}, 330, "<|im_end|>"),
        (SPECIAL, {"eos": "<|im_end|>", "bos_token": "<|endoftext|>"}, 330, "<|im_end|>"),  # a turn's start is none
        (SPECIAL, {"eos": "<|endoftext|>", "unk_token": "<|im_start|>"}, 330, "<|endoftext|>"),
        (["<pad>", *BOTH], {"eos": "<|im_end|>", "template": CHATML + "<pad>"}, 330, "<|endoftext|>"),
        (SPECIAL, {"eos": "<|im_end|>", "template": None}, 330, "<|endoftext|>"),
        ([*BOTH, "<|vision_pad|>"], {"eos": "<|im_end|>"}, 330, "<|vision_pad|>"),
        (["<PAD>", *BOTH], {"eos": "<|im_end|>", "unk_token": "<|endoftext|>"}, 330, "<PAD>"),
        ([*BOTH, "<pad>"], {"eos": "<|im_end|>"}, 2, "<|endoftext|>"),  # <pad> is id 2: no embedding
        (["</s>"], {"eos": "</s>"}, 330, "</s>"),  # nothing else: eos itself
        (["<s>", "</s>"], {"eos": "</s>", "bos_token": "<s>"}, 330, "</s>"),
    ],
)
def test_pad_candidate(special, kwargs, vocab_size, expected):
    assert pad_candidate(make_tokenizer(special=special, **kwargs), vocab_size) == expected


def test_pad_candidate_is_a_special_token():
    ordinary = SimpleNamespace(content="<pad>", special=False)
    tokenizer = SimpleNamespace(
        added_tokens_decoder={0: ordinary}, unk_token=None, eos_token="</s>", bos_token=None, chat_template=None
    )
    assert pad_candidate(tokenizer, 10) == "</s>"


# Any mixture of turns: only answers and the tokens that end them are trained, and never a cut prompt alone

WORDS = st.text(alphabet="ab cd水病🤧.\n", min_size=1, max_size=12).filter(str.strip)


@st.composite
def mixtures(draw, exchanges=4):
    """A system text or none, exchanges with tools now and then, an answer at the end."""
    messages = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, exchanges))):
        messages.append({"role": "user", "content": draw(WORDS)})
        if draw(st.booleans()):
            messages += [{"role": "assistant", "content": draw(WORDS)}, {"role": "tool", "content": draw(WORDS)}]
        messages.append({"role": "assistant", "content": draw(WORDS)})
    return messages


@settings(max_examples=200, deadline=None)
@given(mixtures(), st.integers(1, 60), st.integers(1, 20))
def test_masks_of_any_mixture_of_turns(messages, source, target):
    tokenizer = make_tokenizer(CHATML)
    whole = data_args(10_000, 10_000).encode(tokenizer, messages)
    trained_text = tokenizer.decode([label for label in whole["labels"] if label != -100])
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert trained_text == "".join(answer + END for answer in answers)
    assert tokenizer.decode(whole["input_ids"]) == render(tokenizer, messages).removesuffix("\n")

    cut_row = data_args(source, target).encode(tokenizer, messages)
    assert len(cut_row["input_ids"]) == len(cut_row["labels"]) <= source + target
    assert any(label != -100 for label in cut_row["labels"])
    for token, label in zip(cut_row["input_ids"], cut_row["labels"], strict=True):
        assert label in (-100, token)
    last = tokenizer(answers[-1], add_special_tokens=False)["input_ids"]
    if whole["target_tokens"] <= target:
        assert cut_row["labels"][-1] == tokenizer.eos_token_id
        assert cut_row["labels"][-whole["target_tokens"] :] == cut_row["input_ids"][-whole["target_tokens"] :]
    assert cut_row["target_tokens"] == whole["target_tokens"] >= len(last)


# A long conversation: few encodings of it, and what dropping one exchange after another would keep


def dropped_one_by_one(args, tokenizer, messages):
    while True:
        encoded = args.encode(tokenizer, messages)
        later = [i for i, message in enumerate(messages) if message["role"] == "user"][1:]
        if encoded["source_tokens"] <= args.max_source_length or not later:
            return encoded["input_ids"], encoded["labels"]
        messages = [m for m in messages[:1] if m["role"] == "system"] + messages[later[0] :]


@settings(max_examples=60, deadline=None)
@given(mixtures(exchanges=12), st.integers(1, 300), st.sampled_from([CHATML, NO_SYSTEM]))
def test_as_few_exchanges_go_as_the_limit_asks(messages, source, template):
    args, tokenizer = data_args(source, 20), make_tokenizer(template)
    encoded = args.encode(tokenizer, messages)
    assert (encoded["input_ids"], encoded["labels"]) == dropped_one_by_one(args, tokenizer, messages)
    prompt = args.encode_prompt(tokenizer, messages[:-1])["input_ids"]
    assert prompt == encoded["input_ids"][: len(prompt)] and len(prompt) == encoded["source_kept"]


@pytest.mark.parametrize(("source", "kept"), [(250, 11), (1, 1), (10_000, 256)])
def test_a_long_conversation_is_encoded_a_few_times(chatml, monkeypatch, source, kept):
    texts, call = [], type(chatml).__call__

    def noted(self, text, **kwargs):
        texts.append(text)
        return call(self, text, **kwargs)

    monkeypatch.setattr(type(chatml), "__call__", noted)
    messages = chat(*(f"{word} {number:03}" for number in range(256) for word in ("q", "a")))
    encoded = data_args(source).encode(chatml, messages)
    assert len(trained(chatml, encoded)) == kept
    assert len(texts) <= 10 and sum(map(len, texts)) <= 3 * len(texts[0])
    texts.clear()
    data_args(source).encode_prompt(chatml, messages[:-1])
    assert len(texts) <= 10


# Turns that the template does not show

ZEPHYR = (  # as TinyLlama's, too: knows no tool
    "{% for m in messages %}{% if m.role in ('user', 'system', 'assistant') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OF_PARTS = CHATML.replace("m.content", "m.content if m.role == 'assistant' else m.content[0].text")
NO_WORD_OF_SYSTEM = ZEPHYR.replace("'system', ", "")
SYSTEM_NOT_FIRST = ZEPHYR.replace("{% if m.role in", "{% if (loop.index0 or m.role != 'system') and m.role in")
TOOL = [{"role": "tool", "content": " 21C\n"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(("template", "turn"), [(ZEPHYR, r"tool turn ' 21C"), (OF_PARTS, "user turn 'weather")])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_turn_that_the_template_leaves_out_is_refused(template, turn, system):
    tokenizer, messages = make_tokenizer(template), [*chat("weather?", "{call}", "b", "f()", system=system), *TOOL]
    with pytest.raises(UserError, match=f"the chat template leaves out the {turn}" if not system else "leaves out"):
        data_args().encode(tokenizer, messages)
    with pytest.raises(UserError, match="leaves out the"):
        data_args(1).encode_prompt(tokenizer, messages[:-1])


@pytest.mark.parametrize("template", [NO_WORD_OF_SYSTEM, SYSTEM_NOT_FIRST, NO_SYSTEM])
def test_a_system_text_that_the_template_leaves_out_comes_before_the_first_question(template):
    tokenizer, messages = make_tokenizer(template), chat("hello", "a", "b", "水", system="Be brief.")
    whole = data_args().encode(tokenizer, messages)["input_ids"]
    assert tokenizer.decode(whole).startswith("<|im_start|>user\nBe brief.\n\nhello<|im_end|>")
    cut = data_args(len(whole) - 6).encode(tokenizer, messages)  # of the answer, 4 tokens
    assert tokenizer.decode(cut["input_ids"]).startswith("<|im_start|>user\nBe brief.\n\nb<|im_end|>")


def test_a_text_that_the_template_trims_escapes_and_capitalizes_is_not_left_out():
    tokenizer = make_tokenizer(
        ZEPHYR.replace("m.content | trim", "(m.content | trim | capitalize | replace('<', '&lt;'))")
    )
    prompt = data_args().encode_prompt(tokenizer, chat(" is A < B?\n", system=" be brief. "))["input_ids"]
    assert "Be brief.<|im_end|>\n<|im_start|>user\nIs a &lt; b?<|im_end|>" in tokenizer.decode(prompt)


@pytest.mark.parametrize("target", [1, 2, 256])
def test_no_length_makes_a_word_the_end_of_an_answer(target):
    tokenizer = make_tokenizer(eos="<|endoftext|>")
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert tokenizer.convert_ids_to_tokens(data_args(target=target).eos_ids(model, tokenizer)) == [SPECIAL[0], END]


@pytest.mark.parametrize(("prompt", "joins"), [(r"<|bot|>\n", False), (r"<|bot|>\n ", True), ("Bot:", False)])
def test_a_prompt_that_ends_inside_a_token_is_told(prompt, joins, default_model, logged):
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    turns = f"{{% for m in messages %}}{{{{ '{prompt}' if m.role == 'assistant' else 'User:' }}}}{{{{ m.content }}}}"
    tokenizer.chat_template = f"{turns}{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}{{% endif %}}"
    warn_of_joined_tokens(tokenizer)
    assert any("an answer's first token takes some of it in" in line for line in logged) == joins
