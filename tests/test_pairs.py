"""The answers of a pair in one row behind their prompt: masks by hand, scores and gradients as of two rows."""

from types import SimpleNamespace

import pytest
import torch
from conftest import history, in_process, results, stage
from datasets import Dataset
from tiny_models import FAMILIES
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from arguments.answers import win_rate
from arguments.pairs import collate_pairs, keeps_answers_apart, may_share, places, score_pairs, with_length
from reward_modeling import accuracies

# A prompt 5, 6 and what comes behind it; then answers of which one begins with the other
PAIRS = [
    {"chosen_ids": [5, 6, 7, 8], "rejected_ids": [5, 6, 9]},
    {"chosen_ids": [5, 6], "rejected_ids": [5, 6, 9, 10]},
    {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6]},
    {"chosen_ids": [7], "rejected_ids": [8, 9]},
]
SHARING = sorted(set(FAMILIES) - {"bloom"})  # ALiBi knows no position_ids


def test_rows_and_spans_by_hand():
    batch = collate_pairs(PAIRS, pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 6, 9, 10], [5, 6, 7, 6, 0], [7, 8, 9, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 5, 4, 3]
    assert batch["spans"].tolist() == [[2, 4, 5], [1, 2, 5], [1, 3, 4], [0, 1, 3]]


def test_an_end_that_is_the_paddings_is_not_read():
    batch = collate_pairs([{"chosen_ids": [5, 0, 7, 0, 0], "rejected_ids": [0, 0]}], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 0, 7, 0]] and batch["spans"].tolist() == [[0, 3, 4]]


def test_places_by_hand():
    positions, seen = places(torch.tensor([[2, 4, 5], [0, 1, 3]]), 6)
    assert positions.tolist() == [[0, 1, 2, 3, 2, 0], [0, 0, 1, 0, 0, 0]]
    assert seen.shape == (2, 1, 6, 6)
    lines = ["".join("x" if one else "." for one in line) for line in seen[0, 0]]
    assert lines == ["x.....", "xx....", "xxx...", "xxxx..", "xx..x.", "xx..xx"]


def prepared(folder: str):
    torch.manual_seed(1)  # for the head
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    model.config.get_text_config().pad_token_id = 0
    return model


@pytest.mark.parametrize("family", SHARING)
def test_scores_and_gradients_equal_those_of_two_rows(tiny, family):
    found = []
    for shared in (True, False):
        model = prepared(tiny(family))
        if shared:
            scores = score_pairs(model, model, **collate_pairs(PAIRS, 0), use_cache=False).logits
        else:
            rows = [pair[name] for name in ("chosen_ids", "rejected_ids") for pair in PAIRS]
            scores = torch.cat([model(torch.tensor([ids]), use_cache=False).logits for ids in rows])
        chosen, rejected = scores.chunk(2)
        (-logsigmoid(chosen - rejected).mean() + scores.square().mean()).backward()
        found.append([scores, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert_close(*found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_model_is_asked_whether_pairs_may_share(tiny, family):
    assert keeps_answers_apart(prepared(tiny(family))) == (family in SHARING)


def test_a_model_that_lets_answers_see_each_other_is_found_out(tiny, monkeypatch):
    monkeypatch.setattr("arguments.pairs.places", lambda spans, length: (torch.arange(length)[None], None))
    assert not keeps_answers_apart(prepared(tiny("llama")))


def test_a_model_that_reads_no_positions_is_found_out(tiny, monkeypatch):
    """Its answers do not see each other, but the rejected one starts behind the chosen one."""

    def counted(spans, length):
        return torch.arange(length)[None], places(spans, length)[1]

    monkeypatch.setattr("arguments.pairs.places", counted)
    assert not keeps_answers_apart(prepared(tiny("gpt2")))


def test_a_model_that_refuses_the_mask_is_no_error(tiny, monkeypatch):
    monkeypatch.setattr("arguments.pairs.places", lambda spans, length: 1 / torch.ones(3, 0) @ torch.ones(2))
    assert not keeps_answers_apart(prepared(tiny("llama")))


ROWS = Dataset.from_list([{"chosen_ids": [5, 6, 7, 8], "rejected_ids": [5, 6, 9], "length": 4, "together": 5}])
PLAIN = {"pad_to_multiple_of": None}


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"sliding_window": 63}, {}),
        ({"attention_chunk_size": 63}, {}),
        ({"layer_types": ["full_attention", "linear_attention"]}, {}),
        ({"_attn_implementation": "eager"}, {}),
        ({}, {"pad_to_multiple_of": 8}),
    ],
)
def test_what_is_not_asked(settings, flags, tiny):
    model = prepared(tiny("llama"))
    assert may_share(model, SimpleNamespace(**PLAIN), ROWS, 64)
    for name, value in settings.items():
        setattr(model.config, name, value)
    assert not may_share(model, SimpleNamespace(**PLAIN | flags), ROWS, 64)


def test_pairs_with_little_in_common_stay_apart(tiny):
    """Of 7 tokens 2 are saved; with a longer answer 2 of 14, less than is worth a longer row."""
    longer = ROWS.map(lambda row: {"rejected_ids": [*row["rejected_ids"], *range(10, 17)], "together": 12})
    assert with_length(ROWS, True)["length"][:] == [5] and with_length(ROWS, False)["length"][:] == [4]
    assert may_share(prepared(tiny("llama")), SimpleNamespace(**PLAIN), ROWS, 64)
    assert not may_share(prepared(tiny("llama")), SimpleNamespace(**PLAIN), longer, 64)


WHOLE = ("--use_peft", "False", "--learning_rate", 1e-3)  # then accelerate's hooks are on the model itself


@pytest.mark.parametrize(
    ("family", "more", "near"),
    [
        ("llama", ("--precision", "fp32"), 1e-4),
        ("gpt2", ("--precision", "fp32"), 1e-4),
        ("llama", (*WHOLE, "--precision", "fp32"), 1e-4),
        ("llama", (*WHOLE, "--precision", "bf16"), 1e-2),
    ],
)
def test_a_run_that_shares_learns_as_one_that_does_not(family, more, near, tiny, records, tmp_path, monkeypatch):
    same_order = ("--train_sampling_strategy", "random", "--eval_on_start", *more)
    flags = stage("rm", tiny(family), records, tmp_path / "shared", *same_order)
    assert "answers in one row" in in_process(*flags).ok().stderr
    monkeypatch.setattr("arguments.pairs.keeps_answers_apart", lambda model: False)
    flags = [tmp_path / "alone" if flag == tmp_path / "shared" else flag for flag in flags]
    assert "answers in two rows" in in_process(*flags).ok().stderr
    assert history(tmp_path / "shared", "loss") == pytest.approx(history(tmp_path / "alone", "loss"), abs=near)
    shared, alone = results(tmp_path / "shared"), results(tmp_path / "alone")
    assert "eval_num_tokens" not in shared  # trl's count of what this process has trained, not the run
    for key in ("eval_loss_before", "eval_loss", "eval_accuracy", "eval_margin"):
        assert shared[key] == pytest.approx(alone[key], abs=near), key


def test_the_centering_term_is_in_the_held_out_loss(tiny, records, tmp_path):
    """Before training, so of the same scores: twice the coefficient adds twice as much."""
    losses = []
    for coefficient in (0, 1, 2):
        flags = ("--eval_on_start", "--precision", "fp32", "--center_rewards_coefficient", coefficient)
        in_process(*stage("rm", tiny("llama"), records, tmp_path / str(coefficient), *flags)).ok()
        losses.append(results(tmp_path / str(coefficient))["eval_loss_before"])
    none, once, twice = losses
    assert once > none and twice - none == pytest.approx(2 * (once - none), rel=1e-4)


def test_ties_count_half():
    margins = torch.tensor([2.0, 0.0, -1.0, 0.0])
    expected = {"accuracy": 0.5, "margin": 0.25, "accuracy_unsafe": 0.75, "accuracy_wrong": 0.25}
    assert accuracies(margins, ["unsafe", "unsafe", "wrong", "wrong"]) == pytest.approx(expected)
    assert accuracies(margins, ["", "", "", ""]) == pytest.approx({"accuracy": 0.5, "margin": 0.25})
    assert win_rate([3, 2, 1, 5], [2, 2, 4, 1]) == 0.625
