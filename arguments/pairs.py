"""The two answers of a pair in one row, behind the prompt they share: that is computed once."""

import inspect
from contextlib import contextmanager

import torch
from loguru import logger
from torch.nn.utils.rnn import pad_sequence
from transformers.integrations import is_deepspeed_zero3_enabled


def shared_tokens(chosen: list[int], rejected: list[int]) -> int:
    """How many tokens two answers share at the start, but for at least one that each keeps of its own."""
    shortest = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)


def collate_pairs(pairs: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Batch of rows {"chosen_ids", "rejected_ids"}, padded on the right.

    An end that is the padding's token is left out: wherever else the model is used, it takes its score before that.

    Returns:
        "input_ids" and "attention_mask" [pairs, length], and "spans" [pairs, 3]: where the shared prompt ends, where
        the chosen answer behind it does, and where the rejected one behind that does. Both have one token or more.
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

    A rejected answer stands at the positions behind its prompt and does not see the chosen one. Nothing sees the
    padding at the end, which sees something, for a softmax over nothing is not a number.
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
        outputs.logits = scores[rows.to(scores.device), ends.to(scores.device)]
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

    The mask of the padding is for those who count tokens: nothing looks ahead to it.
    """
    positions, seen = places(spans, input_ids.shape[1])
    with scores_at_ends(inner, spans):
        return model(input_ids=input_ids, attention_mask=seen, position_ids=positions, **kwargs)


def may_share(model, longest: int) -> bool:
    """Whether by its settings a model takes pairs of up to `longest` tokens in one row.

    The mask needs SDPA, the positions a parameter; layers that look back a part of the way would forget it.
    """
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return (
        config._attn_implementation == "sdpa"
        and "position_ids" in inspect.signature(model.forward).parameters
        and hasattr(model, "score")
        and all(window is None or window >= longest for window in windows)
    )


@torch.no_grad()
def shares_prompts(model, longest: int) -> bool:
    """Whether the pairs of a model may share rows: it is asked, where its settings allow it.

    What the chosen answer says must not move the rejected one's score, and both scores have to be those of two rows,
    to within what bfloat16 rounds.
    """
    if is_deepspeed_zero3_enabled() or not may_share(model, longest):  # ZeRO-3 has split the weights already
        return False
    config = model.config.get_text_config()
    ids = (1 + config.pad_token_id + torch.arange(64)) % config.vocab_size  # a score is taken before the padding's id
    prompts, answers, others = ids[:8].repeat(8, 1), ids[8:48].view(8, 5), ids[48:].view(8, 2)
    chosen, changed = (torch.cat([prompts, behind], dim=1).tolist() for behind in (answers[:, :2], others))
    rejected = torch.cat([prompts, answers.flip(0)], dim=1).tolist()

    def scores(rows):
        return model(torch.tensor(rows, device=model.device), use_cache=False).logits

    def shared(rows):
        pairs = [{"chosen_ids": a, "rejected_ids": b} for a, b in zip(rows, rejected, strict=True)]
        batch = {name: tensor.to(model.device) for name, tensor in collate_pairs(pairs, 0).items()}
        return score_pairs(model, model, **batch, use_cache=False).logits

    training = model.training
    model.eval()
    try:
        alone, together, moved = torch.cat([scores(chosen), scores(rejected)]), shared(chosen), shared(changed)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        logger.info(f"{model.config.model_type} refuses a mask of its own: chosen and rejected in two rows ({error})")
        return False
    finally:
        model.train(training)
    near = (together - alone).norm() <= 0.05 * alone.norm()
    return bool(near) and torch.equal(together[8:], moved[8:])
