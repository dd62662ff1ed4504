"""Stage 4 on tensors without storage: sampling with a KV cache, scoring, and an update of one micro-batch."""

import math

import torch
from transformers import DynamicCache

from arguments.loss import logits_at
from arguments.rehearsal import Load, Rehearsal, evaluates, longest
from arguments.roles import ActorCritic, build_actor_critic, collate
from arguments.shapes import Footprint


class PPORehearsal(Rehearsal):
    """A Rehearsal of all roles; a reward model that shares no base is `model.beside`, in the dtype it is loaded in."""

    copies = 2  # the last good policy, for the guards

    def with_casts(self, built: tuple) -> ActorCritic:
        model, reward_model = built
        model = super().with_casts(model)
        model.beside = reward_model
        return model


def rehearse_ppo(model_args, adapter_args, args, train, held_out, data_args, reward_args, load: Load) -> Rehearsal:
    """Stage 4: sampling with a KV cache, scoring, and an update of one micro-batch; answers of the full length."""

    def build():
        return build_actor_critic(model_args, adapter_args, data_args, reward_args, args.critic)

    found = PPORehearsal(build, model_args, args, load, accumulates=True)
    found.model.autocast = found.accelerator.autocast
    found.footprint.now["adapters"] += sum(p.nbytes for p in found.trained)  # the last good policy, for the guards
    answer = math.ceil(load.share * data_args.max_target_length)
    sampled = min(8 * load.rows, max(args.batch_size, len(held_out) if evaluates(args) else 0))
    prompts = [row["input_ids"] for row in longest(train, load, sampled)]
    found.phase("sample", lambda: sample(found, (len(prompts), len(prompts[0])), answer), grad=False)
    answers = [{"prompt": prompts[0], "ids": [1] * answer}] * min(load.rows, args.batch_size)
    batch = collate(answers, 0, found.device)
    batch["states"] = torch.zeros(*batch["tokens"].shape, found.model.value_head.in_features, device=found.device)
    found.phase("score", lambda: score(found, batch), grad=False)
    if args.critic == "head" and found.device.type == "cpu":  # it reads the states of a whole rollout, kept on the CPU
        rollout = args.batch_size * args.world_size
        found.footprint.now["activations"] += rollout * batch["states"].nbytes // len(batch["states"])
    found.phase("update", lambda: update(found, batch))
    return found


def tokens(found: Rehearsal, *shape: int) -> torch.Tensor:
    """Token ids; which ones does not matter."""
    return torch.ones(shape, dtype=torch.long, device=found.device)


class CountedCache(DynamicCache):
    """A KV cache whose tensors are counted under "KV cache"."""

    def __init__(self, footprint: Footprint):
        super().__init__()
        self.footprint = footprint

    def update(self, *args, **kwargs):
        states = super().update(*args, **kwargs)
        self.footprint.label("KV cache", states)
        return states


def sample(found: Rehearsal, shape: tuple[int, int], answer: int) -> None:
    """What generate holds at its widest: prompts [rows, tokens], and the step that draws the last of `answer` tokens.

    In between, the cache grows by as many tokens as the prompts have, or fewer: one at a time would take long.
    """
    rows, prompt = shape
    cache, seen = CountedCache(found.footprint), 0
    widths = [prompt, *(min(prompt, answer - 2 - at) for at in range(0, answer - 2, prompt)), 1]
    with found.model.role("policy") as model, found.accelerator.autocast():
        for width in widths:
            seen += width
            last = torch.arange(rows, device=found.device), torch.full((rows,), width - 1, device=found.device)
            mask = tokens(found, rows, seen)
            mask[0, 0] = 0  # padding on the left, as prompts of several lengths have it
            with logits_at(model, *last):
                ids = tokens(found, rows, width)
                logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[0]
            logits.float().softmax(-1).double().cumsum(-1)  # the choice of a token


def score(found: Rehearsal, batch: dict) -> None:
    """Log-probabilities under policy (with entropies) and reference, then hidden states for reward and value."""
    for role in ("policy", "reference"):
        found.model.token_logp(role, batch, found.args.temperature)
    if (beside := found.model.beside) is not None:  # it makes ids of text, no more than it knows positions
        beside.model(input_ids=batch["ids"][:, : beside.positions])
    found.model.hidden(found.model.frozen_role, batch["ids"])


def update(found: Rehearsal, batch: dict) -> None:
    """Forward and backward of the policy, then of the value function."""
    logp, _ = found.model.token_logp("policy", batch, found.args.temperature)
    logp.exp().sum().backward()
    found.model.token_values(batch).square().sum().backward()
