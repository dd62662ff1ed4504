"""The answers of a pair in one row behind their prompt: masks by hand, scores and gradients as of two rows."""

import pytest
import torch
from conftest import history, in_process, results, stage
from tiny_models import FAMILIES
from torch.nn.functional import logsigmoid
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from arguments.pairs import collate_pairs, may_share, places, score_pairs, shares_prompts

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
    assert shares_prompts(prepared(tiny(family)), 64) == (family in SHARING)


def test_a_model_that_lets_answers_see_each_other_is_found_out(tiny, monkeypatch):
    model = prepared(tiny("llama"))
    monkeypatch.setattr("arguments.pairs.places", lambda spans, length: (torch.arange(length)[None], None))
    assert not shares_prompts(model, 64)


def test_a_model_that_refuses_the_mask_is_no_error(tiny, monkeypatch):
    monkeypatch.setattr("arguments.pairs.places", lambda spans, length: 1 / torch.ones(3, 0) @ torch.ones(2))
    assert not shares_prompts(prepared(tiny("llama")), 64)


@pytest.mark.parametrize(("name", "value"), [("sliding_window", 63), ("attention_chunk_size", 63)])
def test_a_window_shorter_than_the_rows_is_not_forgotten(tiny, name, value):
    model = prepared(tiny("llama"))
    setattr(model.config, name, value)
    assert may_share(model, 63) and not may_share(model, 64)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_that_shares_learns_as_one_that_does_not(family, tiny, records, tmp_path, monkeypatch):
    flags = stage("rm", tiny(family), records, tmp_path / "shared", "--precision", "fp32", "--eval_on_start")
    in_process(*flags).ok()
    monkeypatch.setattr("arguments.pairs.shares_prompts", lambda model, longest: False)
    in_process(*[tmp_path / "alone" if flag == tmp_path / "shared" else flag for flag in flags]).ok()
    assert history(tmp_path / "shared", "loss") == pytest.approx(history(tmp_path / "alone", "loss"), abs=1e-4)
    shared, alone = results(tmp_path / "shared"), results(tmp_path / "alone")
    for key in ("eval_loss_before", "eval_loss", "eval_accuracy", "eval_margin"):
        assert shared[key] == pytest.approx(alone[key], abs=1e-4), key
