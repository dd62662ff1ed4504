"""Stage 4 on tensors without storage: sampling with a KV cache, scoring, and an update of one micro-batch."""

import math

import torch
from peft import PeftConfig, TaskType
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from arguments.base import adapter_config, is_base
from arguments.loss import logits_at
from arguments.rehearsal import Load, Rehearsal, adapted, base_model, evaluates, longest
from arguments.roles import ActorCritic, collate, disable_dropout, full_precision_head, score_head
from arguments.shapes import Footprint


def actor_critic(model_args, adapter_args, reward_args, critic: str) -> nn.Module:
    """What roles.build_actor_critic makes; a reward model loaded beside the policy is its attribute `beside`."""
    adapter, name = reward_args.find_adapter(), reward_args.reward_model_name_or_path
    shared = bool(adapter) and adapter_args.use_peft and is_base(adapter, model_args.model_name_or_path)
    policy = base_model(model_args, AutoModelForCausalLM)
    full_precision_head(policy, frozen=adapter_args.use_peft)
    size = policy.get_output_embeddings().weight.shape[1]  # OPT-350m's states are wider inside
    policy = adapted(policy, adapter_args, TaskType.CAUSAL_LM)
    if shared:
        policy.add_adapter("reward", PeftConfig.from_pretrained(adapter, inference_mode=True))
    if adapter_args.use_peft and critic == "adapter":
        policy.add_adapter("value", adapter_args.peft_config(TaskType.CAUSAL_LM))
    disable_dropout(policy)
    reward_head = score_head(size, None) if shared else None
    model = ActorCritic(policy, score_head(size, None), reward_head, adapter_args.use_peft, critic)
    if name and not shared:
        source = adapter_config(adapter).base_model_name_or_path if adapter else name
        of_reward = type(model_args)(model_name_or_path=source, dtype=model_args.dtype)
        model.beside = base_model(of_reward, AutoModelForSequenceClassification, num_labels=1).requires_grad_(False)
    return model


def rehearse_ppo(model_args, adapter_args, args, train, held_out, length: int, reward_args, load: Load) -> Rehearsal:
    """Stage 4: sampling with a KV cache, scoring, and an update of one micro-batch; answers of `length` tokens."""

    def build():
        return actor_critic(model_args, adapter_args, reward_args, args.critic)

    found = Rehearsal(build, model_args, args, load, accumulates=True)
    found.model.autocast = found.accelerator.autocast
    found.footprint.now["adapters"] += sum(p.nbytes for p in found.trained)  # the last good policy, for the guards
    answer = math.ceil(load.share * length)
    sampled = min(8 * load.rows, max(args.batch_size, len(held_out) if evaluates(args) else 0))
    prompts = [row["input_ids"] for row in longest(train, load, sampled)]
    found.phase("sample", lambda: sample(found, (len(prompts), len(prompts[0])), answer), grad=False)
    answers = [{"prompt": prompts[0], "ids": [1] * answer}] * min(load.rows, args.batch_size)
    batch = collate(answers, 0, found.device)
    batch["states"] = torch.zeros(*batch["tokens"].shape, found.model.value_head.in_features, device=found.device)
    found.phase("score", lambda: score(found, batch), grad=False)
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
    if hasattr(found.model, "beside"):
        found.model.beside(input_ids=batch["ids"])
    found.model.hidden(found.model.frozen_role, batch["ids"])


def update(found: Rehearsal, batch: dict) -> None:
    """Forward and backward of the policy, then of the value function."""
    logp, _ = found.model.token_logp("policy", batch, found.args.temperature)
    logp.exp().sum().backward()
    found.model.token_values(batch).square().sum().backward()
