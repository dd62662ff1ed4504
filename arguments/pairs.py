"""The two answers of a pair in one row after the prompt they share, which is then computed once."""

import inspect
from contextlib import contextmanager

import torch
from datasets import Dataset
from loguru import logger
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations import is_deepspeed_zero3_enabled

from arguments.model import alike
from arguments.rows import token_lengths

ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers that take a mask
WORTH = 0.15  # least share of tokens to save: one row of two answers needs more attention than two rows


def shared_tokens(chosen: list[int], rejected: list[int]) -> int:
    """Length of the common prefix, but less than the shorter of the two: each keeps a token of its own."""
    shortest = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)


def collate_pairs(pairs: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Batch of rows {"chosen_ids", "rejected_ids"}, padded on the right.

    Padding tokens at the end of an answer are dropped: transformers, too, reads a score at the last other token.

    Returns:
        "input_ids" and "attention_mask" [pairs, length], and "spans" [pairs, 3]: where the shared prompt, the chosen
        answer after it and the rejected one after that end. Both answers have one token or more.
    """
    rows, spans = [], []
    for pair in pairs:
        chosen, rejected = (without_end(pair[name], pad_token_id) for name in ("chosen_ids", "rejected_ids"))
        shared = shared_tokens(chosen, rejected)
        rows.append(torch.tensor(chosen + rejected[shared:]))
        spans.append((shared, len(chosen), len(rows[-1])))
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "spans": torch.tensor(spans)}


def without_end(ids: list[int], token: int) -> list[int]:
    """The ids up to the last that is not `token`; the first one at least."""
    return ids[: max((i for i, one in enumerate(ids) if one != token), default=0) + 1]


def places(spans: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Position of each token [pairs, length], and which tokens each one sees [pairs, 1, length, length].

    A rejected answer takes the positions after its prompt and does not see the chosen one. No answer sees the padding
    at the end; that sees something, since a softmax over nothing is NaN.
    """
    shared, chosen, end = spans.unsqueeze(-1).unbind(1)  # [pairs, 1] each
    at = torch.arange(length, device=spans.device).unsqueeze(0)
    rejected = at >= chosen
    hidden = rejected.unsqueeze(2) & ((at >= shared) & ~rejected).unsqueeze(1)
    positions = (at - rejected * (chosen - shared)) * (at < end)  # no position past the last that a model may have
    return positions, ((at <= at.T) & ~hidden).unsqueeze(1)


@contextmanager
def scores_at_ends(model, spans: torch.Tensor):
    """Inside, the logits of a sequence classification model are [2 * pairs, labels]: of the chosen, then the rejected.

    transformers would give those of each row's last token alone.
    """
    kept = []
    rows, ends = torch.arange(len(spans)).repeat(2), spans[:, 1:].T.flatten() - 1

    def keep(_, inputs, logits):
        kept.append(logits)

    def choose(_, inputs, outputs):
        scores = kept.pop()
        # where and as what a device map and autocast have put what is returned
        outputs.logits = scores[rows.to(scores.device), ends.to(scores.device)].to(outputs.logits)
        return outputs

    # before a wrapper's own hooks, which look at the gradients of what the model returns
    hooks = model.score.register_forward_hook(keep), model.register_forward_hook(choose, prepend=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def score_pairs(model, inner, spans, input_ids, attention_mask, **kwargs):
    """Outputs of `model`, which is `inner` or wraps it, with logits [2 * pairs, labels], for a batch of collate_pairs.

    `attention_mask` only serves to count tokens; the model gets the mask of `places`.
    """
    positions, seen = places(spans, input_ids.shape[1])
    with scores_at_ends(inner, spans):
        return model(input_ids=input_ids, attention_mask=seen, position_ids=positions, **kwargs)


def shared_share(pairs: Dataset) -> float:
    """The share of all tokens of rows {"chosen_ids", "rejected_ids", "together"} that one prompt for both saves."""
    return 1 - sum(pairs["together"][:]) / token_lengths(pairs)["total"]


def may_share(model, args, pairs: Dataset, longest: int) -> bool:
    """Whether settings and rows, of up to `longest` tokens an answer, allow pairs in one row; keeps_answers_apart then
    tests the model.

    The mask needs SDPA, and the positions a parameter. A given mask takes the place of a layer's own window, so none
    may be shorter than `longest`. A model that ZeRO-3 has split cannot be tested.
    """
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return (
        config._attn_implementation == "sdpa"
        and "position_ids" in inspect.signature(model.forward).parameters
        and hasattr(model, "score")
        and all(window is None or window >= longest for window in windows)
        and set(getattr(config, "layer_types", None) or ()) <= ATTENTION
        and not (args.pad_to_multiple_of or is_deepspeed_zero3_enabled())
        and shared_share(pairs) >= WORTH
    )


@torch.no_grad()
def keeps_answers_apart(model) -> bool:
    """Whether mask and position ids make two answers in one row the same to a model as in two rows.

    The model is tested: the last states of both answers must equal those of two rows up to bfloat16's rounding.
    """
    prompt, chosen, rejected = [3, 4, 5, 6], [7, 8], [11, 12, 13]

    def last_states(ids, at, **inputs):
        # output_hidden_states would put hooks around the layers that stay, and that break a compiled layer in two
        found = model.base_model(ids.to(model.device), use_cache=False, **inputs).last_hidden_state
        return found[0, at.to(found.device)].float()

    def in_one_row():
        batch = collate_pairs([{"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}], pad_token_id=-1)
        ids, spans = batch["input_ids"], batch["spans"].to(model.device)
        positions, seen = places(spans, ids.shape[1])
        return last_states(ids, spans[0, 1:] - 1, attention_mask=seen, position_ids=positions)

    def alone(answer):
        return last_states(torch.tensor([prompt + answer]), torch.tensor(-1))

    training = model.training
    model.eval()
    try:
        together, apart = in_one_row(), torch.stack([alone(chosen), alone(rejected)])
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        logger.info(f"{model.config.model_type} refuses a mask of its own ({error})")
        return False
    finally:
        model.train(training)
    return all(map(alike, together, apart))


def shares_prompts(model, args, pairs: Dataset, longest: int) -> bool:
    """Whether the answers of a pair share a row: if settings and rows allow it and the model passes the test."""
    shared = may_share(model, args, pairs, longest) and keeps_answers_apart(model)
    logger.info(f"Chosen and rejected answers in {'one row' if shared else 'two rows'}")
    return shared


def with_length(pairs: Dataset, shared: bool) -> Dataset:
    """`pairs` whose "length", by which batches are made, is that of the rows they become."""
    if not shared:
        return pairs
    return pairs.remove_columns("length").rename_column("together", "length")
