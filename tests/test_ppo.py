"""PPO's arithmetic against numbers worked out by hand, and a bandit whose optimum is known."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import FAMILIES, save_tiny
from torch.utils.data import BatchSampler
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    FalconConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MiniMaxConfig,
    MixtralConfig,
    PhimoeConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from arguments.answers import correlation, describe, distinct, kl_estimate
from arguments.command_line import UserError
from arguments.guards import GuardArguments
from arguments.model import ModelArguments
from arguments.roles import VALUE, ActorCritic, as_trained, disable_dropout, score_head, trunk
from arguments.sampling import InverseTransformSampling, chunks, takes_padding, uniforms
from rl_training import (
    PPOArguments,
    PPOTrainer,
    adapted_kl_coef,
    advantages_and_returns,
    collate,
    explained_variance,
    policy_loss,
    prompt_order,
    token_rewards,
    value_loss,
    whiten,
)


def close(found, expected, **kwargs):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), **kwargs)


# advantages

# gamma .9, lam .8: delta_t = r_t + .9 V_(t+1) - V_t and A_t = delta_t + .72 A_(t+1), inside the mask alone
RAGGED = {  # mask, rewards, values, advantages, returns
    "gaps before and after": (  # delta: 1 + .9*1 - .5 = 1.4 and 2 - 1 = 1;  A: 1.4 + .72*1, 1
        [0, 1, 1, 0],
        [9, 1, 2, 9],
        [5, 0.5, 1, 7],
        [0, 2.12, 1, 0],
        [0, 2.62, 2, 0],
    ),
    "whole row": (  # delta: .08, .07, .06, .6;  A: .6, .06 + .432, .07 + .35424, .08 + .3054528
        [1, 1, 1, 1],
        [0, 0, 0, 1],
        [0.1, 0.2, 0.3, 0.4],
        [0.3854528, 0.42424, 0.492, 0.6],
        [0.4854528, 0.62424, 0.792, 1.0],
    ),
    "gap before, one token": ([0, 0, 0, 1], [9, 9, 9, -1], [9, 9, 9, 2], [0, 0, 0, -3], [0, 0, 0, -1]),
    "gap after, one token": ([1, 0, 0, 0], [3, 9, 9, 9], [1, 9, 9, 9], [2, 0, 0, 0], [3, 0, 0, 0]),
    "nothing": ([0, 0, 0, 0], [9, 9, 9, 9], [9, 9, 9, 9], [0, 0, 0, 0], [0, 0, 0, 0]),
}


def test_advantages_by_hand():
    mask, rewards, values, advantages, returns = (
        torch.tensor(rows, dtype=torch.float32) for rows in zip(*RAGGED.values(), strict=True)
    )
    found = advantages_and_returns(rewards, values, mask, 0.9, 0.8)
    close(found[0], advantages)
    close(found[1], returns)


def random_batch(seed, rows=7, width=11):
    """Rewards, values and a mask with one stretch of random place and length a row."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, width, generator=generator)
    ends = torch.randint(0, width + 1, (rows, 2), generator=generator).sort(1).values
    columns = torch.arange(width)
    return rewards, values, ((columns >= ends[:, :1]) & (columns < ends[:, 1:])).float(), ends.tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 0.95), (1.0, 1.0), (0.5, 0.0)])
def test_advantages_equal_a_naive_loop(seed, gamma, lam):
    rewards, values, mask, ends = random_batch(seed)
    expected = torch.zeros_like(rewards)
    for row, (start, end) in enumerate(ends):
        for t in range(start, end):  # the definition: a discounted sum of deltas, without recursion
            for k in range(t, end):
                following = values[row, k + 1] if k + 1 < end else 0.0
                delta = rewards[row, k] + gamma * following - values[row, k]
                expected[row, t] += (gamma * lam) ** (k - t) * delta
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam)
    close(advantages, expected, atol=1e-5, rtol=1e-5)
    close(returns, (expected + values) * mask, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_without_discount_returns_are_rewards_to_go(seed):
    rewards, values, mask, _ = random_batch(seed)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    advantages, returns = advantages_and_returns(rewards, values, mask, 1.0, 1.0)
    close(advantages, (to_go - values) * mask, atol=1e-5, rtol=1e-5)
    close(returns, to_go, atol=1e-5, rtol=1e-5)


def test_whiten():
    x, mask = torch.tensor([[1.0, 99, 2], [99, 3, 99]]), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    close(whiten(x, mask), [[-1, 0, 0], [0, 1, 0]])  # mean 2, variance (1 + 0 + 1) / 2


@pytest.mark.parametrize("seed", range(3))
def test_whitened_moments(seed):
    x, _, mask, _ = random_batch(seed, rows=30)
    kept = whiten(5 * x + 3, mask)[mask.bool()]
    close(kept.mean(), 0.0, atol=1e-5, rtol=0)
    close(kept.var(unbiased=True), 1.0, atol=1e-4, rtol=0)


def test_whiten_of_one_or_equal_numbers_is_finite():
    close(whiten(torch.tensor([[5.0, 7]]), torch.tensor([[1.0, 0]])), [[0, 0]])
    close(whiten(torch.full((2, 2), 5.0), torch.ones(2, 2)), [[0, 0], [0, 0]])


# losses, clip .2: loss and its gradient


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 1.0, -1.0, -1.0),
        (1.1, 2.0, -2.2, -2.2),  # inside on both sides
        (0.9, -2.0, 1.8, 1.8),
        (1.5, 1.0, -1.2, 0.0),  # good and already likelier: clipped
        (0.5, -1.0, 0.8, 0.0),  # bad and already less likely: clipped
        (1.5, -1.0, 1.5, 1.5),  # moved the wrong way: never clipped
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_policy_loss(ratio, advantage, loss, gradient):
    old = torch.tensor([[-2.0, -1.0]])
    logp = (old + torch.tensor([[ratio, 3.0]]).log()).requires_grad_()
    found = policy_loss(logp, old, torch.tensor([[advantage, 5.0]]), torch.tensor([[1.0, 0.0]]), 0.2)
    found.backward()
    close(found.detach(), loss)
    close(logp.grad, [[gradient, 0.0]])  # d(-A rho) / d logp = -A rho; the second token is masked


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        (1.1, 2.0, 0.405, -0.9),  # the old value is 1: inside, .9^2 / 2
        (1.5, 2.0, 0.32, 0.0),  # max(.5^2, (1.2 - 2)^2) / 2: clipped
        (0.5, 0.0, 0.32, 0.0),  # max(.5^2, .8^2) / 2: clipped
        (1.5, 0.0, 1.125, 1.5),  # max(1.5^2, 1.2^2) / 2: moved the wrong way
        (0.5, 2.0, 1.125, -1.5),
    ],
)
def test_value_loss(value, target, loss, gradient):
    values = torch.tensor([[value, 8.0]], requires_grad=True)
    found = value_loss(values, torch.ones(1, 2), torch.tensor([[target, 0.0]]), torch.tensor([[1.0, 0.0]]), 0.2)
    found.backward()
    close(found.detach(), loss)
    close(values.grad, [[gradient, 0.0]])


def test_losses_are_sums_over_tokens():
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    assert policy_loss(zeros, zeros, 2 * ones, ones, 0.2).item() == -12
    assert value_loss(zeros, zeros, 2 * ones, ones, 0.2).item() == 12


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.05), (12.0, 0.050064), (60.0, 0.050064), (0.0, 0.049936), (6.6, 0.050032), (5.4, 0.049968)],
)
def test_adapted_kl_coef(kl, expected):
    assert adapted_kl_coef(0.05, kl, target=6.0, samples=64, horizon=10000) == pytest.approx(expected, abs=1e-12)


def test_bandit_reaches_the_known_optimum():
    """max E[r] - beta KL(pi, ref) is softmax(log ref + r / beta)."""
    torch.manual_seed(0)
    beta, rewards, samples = 0.5, torch.tensor([1.0, 0.0, 0.5, -1.0]), 1024
    reference = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()
    optimum = (reference + rewards / beta).softmax(0)
    close(optimum, [0.3729, 0.2019, 0.4116, 0.0137], atol=1e-4, rtol=0)
    logits = reference.clone().requires_grad_()
    optimizer, mask, seen = torch.optim.Adam([logits], lr=0.03), torch.ones(samples, 1), []
    for step in range(250):
        with torch.no_grad():
            old = logits.log_softmax(0)
            actions = torch.multinomial(old.exp(), samples, replacement=True).unsqueeze(1)
            reward = -beta * (old - reference)[actions] + rewards[actions]
            baseline = reward.mean().expand_as(reward)
            advantages, _ = advantages_and_returns(reward, baseline, mask, 1.0, 0.95)
        for _ in range(4):
            loss = policy_loss(logits.log_softmax(0)[actions], old[actions], advantages, mask, 0.2) / samples
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step >= 200:
            seen.append(logits.detach().softmax(0))
    close(torch.stack(seen).mean(0), optimum, atol=0.05, rtol=0)


def test_token_rewards():
    logp, ref_logp = torch.tensor([[-1.0, -2, -3], [-1, 0, 0]]), torch.tensor([[-2.0, -2, -1], [-3, 0, 0]])
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    found = token_rewards(logp, ref_logp, torch.tensor([5.0, -7.0]), mask, 0.5)
    close(found, [[-0.5, 0, 6], [-8, 0, 0]])  # -.5 (logp - ref_logp), and the score at the last token


# the same numbers as TRL 1.12, the last with PPO; tests/fixtures/make_trl_ppo.py recorded them


TRL = json.loads(Path(__file__).with_name("fixtures").joinpath("trl_ppo.json").read_text())


def as_tensors(record):
    return {name: torch.tensor(numbers) for name, numbers in record.items()}


@pytest.mark.parametrize("rollout", TRL["rollouts"])
def test_rollout_equals_trl(rollout):
    trl, settings = as_tensors(rollout), TRL["settings"]
    mask = torch.ones_like(trl["logp"])
    rewards = token_rewards(trl["logp"], trl["ref_logp"], trl["scores"], mask, settings["kl_coef"])
    advantages, returns = advantages_and_returns(rewards, trl["values"], mask, settings["gamma"], settings["lam"])
    for found, name in (
        (rewards, "rewards"),
        (advantages, "advantages"),
        (returns, "returns"),
        (whiten(advantages, mask), "whitened"),
    ):
        close(found, trl[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("step", TRL["steps"])
def test_losses_and_gradients_equal_trl(step):
    trl, settings = as_tensors(step), TRL["settings"]
    mask, logp, values = torch.ones_like(trl["logp"]), trl["logp"].requires_grad_(), trl["values"].requires_grad_()
    policy = policy_loss(logp, trl["old_logp"], trl["advantages"], mask, settings["cliprange"]) / mask.sum()
    value = value_loss(values, trl["old_values"], trl["returns"], mask, settings["cliprange_value"]) / mask.sum()
    (policy + value).backward()
    close(policy.detach(), trl["policy_loss"], atol=1e-6, rtol=1e-6)
    close(value.detach(), trl["value_loss"], atol=1e-6, rtol=1e-6)
    close(logp.grad, trl["new_logprobs_gradient"], atol=1e-6, rtol=1e-6)
    close(values.grad, trl["vpred_gradient"], atol=1e-6, rtol=1e-6)


def test_trl_fixture_clips_on_both_sides():
    """What is compared above would mean little if no ratio and no value had left its range."""
    for new, old, clip in (("logp", "old_logp", "cliprange"), ("values", "old_values", "cliprange_value")):
        moved = torch.cat([torch.tensor(step[new]) - torch.tensor(step[old]) for step in TRL["steps"]])
        assert (moved > TRL["settings"][clip]).sum() > 10 and (moved < -TRL["settings"][clip]).sum() > 10


# the order of prompts


@pytest.mark.parametrize(
    ("every", "steps"), [(0.5, 30), (0.25, 16), (0.01, 2), (0.3, 18), (1, 2), (1.5, 4), (7, 14), (7.0, 14)]
)
def test_checkpoints_fall_between_rollouts(every, steps, tmp_path):
    """30 rollouts of two steps; below 1 it is a share of all steps, as transformers has it (0.25: 7.5 rollouts)."""
    counted = {"save_steps": every, "logging_steps": every, "eval_steps": every}
    args = PPOArguments(output_dir=str(tmp_path), max_steps=30, ppo_epochs=2, **counted)
    assert (args.max_steps, args.save_steps, args.logging_steps, args.eval_steps) == (60, steps, steps, steps)


@pytest.mark.parametrize(
    ("prompts", "per_rollout", "rollouts", "repeats"), [(5, 2, 7, 3), (12, 4, 6, 1), (3, 8, 2, 2)]
)
def test_prompt_order(prompts, per_rollout, rollouts, repeats):
    order = prompt_order(prompts, per_rollout, rollouts, repeats, seed=42)
    assert len(order) == per_rollout * rollouts * repeats
    steps = [order[i : i + per_rollout] for i in range(0, len(order), per_rollout)]
    once = steps[::repeats]
    assert steps == [chunk for chunk in once for _ in range(repeats)]  # each rollout's prompts, `repeats` times
    flat = [index for chunk in once for index in chunk]
    passes = [flat[i : i + prompts] for i in range(0, len(flat), prompts)]
    assert all(sorted(p) == list(range(prompts)) for p in passes[:-1])  # all prompts before any comes again
    assert len(set(passes[-1])) == len(passes[-1])


def test_prompt_order_depends_on_the_seed_alone():
    order = prompt_order(50, 4, 20, 2, seed=1)
    assert order == prompt_order(50, 4, 20, 2, seed=1) != prompt_order(50, 4, 20, 2, seed=2)
    assert prompt_order(50, 4, 30, 2, seed=1)[: len(order)] == order  # a longer run starts as a shorter one
    assert sorted(order[:100:2]) != order[:100:2]


def test_two_ranks_share_every_rollout():
    batch, repeats = 2, 3
    order = prompt_order(8, 2 * batch, 4, repeats, seed=0)
    sampler = BatchSampler(order, batch, drop_last=False)
    ranks = [list(BatchSamplerShard(sampler, num_processes=2, process_index=rank)) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == 4 * repeats
    for steps in ranks:  # a rank has the same prompts in all steps of a rollout
        assert all(len({tuple(b) for b in steps[i : i + repeats]}) == 1 for i in range(0, len(steps), repeats))
    both = [first + second for first, second in zip(*ranks, strict=True)]
    assert [index for step in both for index in step] == order
    assert all(len(set(step)) == 2 * batch for step in both)


# scores


@pytest.mark.parametrize(
    ("answer", "finished", "end", "pad", "read", "column"),
    [
        ([6, 2], True, 2, 0, [5, 6, 2, 0], 2),
        ([6, 7, 2], True, 2, 0, [5, 6, 7, 2], 3),
        ([0, 7, 2], True, 2, 0, [5, 0, 7, 2], 3),  # a pad token inside is no padding
        ([6, 0], True, 2, 0, [5, 6, 2, 0], 2),  # ended by the pad token, as a Qwen may
        ([6, 3], True, 2, 0, [5, 6, 2, 0], 2),  # by another end
        ([6, 0], False, 2, 0, [5, 6, 0, 0], 2),  # cut
        ([6, 2], True, 2, 2, [5, 6, 2, 2], 1),  # pad == eos: one token early, as in AutoModelForSequenceClassification
        ([2], True, 2, 2, [5, 2, 2, 2], 0),
        ([6, 7], False, 2, 2, [5, 6, 7, 2], 2),
    ],
)
def test_what_a_reward_adapter_reads(answer, finished, end, pad, read, column):
    row = {"prompt": [5], "ids": answer, "finished": finished}
    ids = torch.tensor([([5] + answer + 4 * [pad])[:4]])
    found, columns = as_trained(ids, [row], end, pad)
    assert found.tolist() == [read] and columns.tolist() == [column]


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        num_labels=1,
    )
    policy = LlamaForCausalLM(config).eval()
    head = score_head(16, {"weight": torch.randn(1, 16)})
    return ActorCritic(policy, head, None, lora=False, critic="adapter").eval()


def test_layers_called_value_train_with_the_policy(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["query", "value", "position_embeddings"])
    policy = get_peft_model(BertLMHeadModel(BertConfig(vocab_size=32, is_decoder=True, **size)), config)
    policy.add_adapter(VALUE, config)
    model = ActorCritic(policy, score_head(16, None), None, lora=True, critic="adapter")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_policy, of_value = ([names[id(parameter)] for parameter in part] for part in model.trained())
    assert len(of_policy) == 6 and all("default" in name for name in of_policy)
    assert len(of_value) == 7 and all(VALUE in name for name in of_value if not name.startswith("value_head"))
    model.save(tmp_path)
    for name in ("adapter_model", "value/model"):
        saved = load_file(tmp_path / f"{name}.safetensors")
        assert len(saved) == 6 and sum(".value.lora" in name for name in saved) == 2


def padded(rows, width, pad=0):
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


@torch.no_grad()
def score(tiny, rows, width):
    ids, _ = padded(rows, width)
    outputs = tiny.value_head(tiny.hidden("value", ids)).squeeze(-1)
    return torch.stack([found[len(row) - 1] for found, row in zip(outputs, rows, strict=True)])


SMALL = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 32, "num_key_value_heads": 2}
ROWS = [[5, 6, 7, 2], [8, 9, 10, 11, 12, 2], [13, 2]]


def test_score_does_not_depend_on_padding(tiny):
    alone = torch.cat([score(tiny, [row], len(row)) for row in ROWS])
    assert len(set(alone.tolist())) == 3
    close(score(tiny, ROWS, 6), alone, atol=1e-5, rtol=1e-5)
    close(score(tiny, ROWS, 11), alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pad", [0, 2])
def test_score_is_that_of_sequence_classification(tiny, pad):
    reward = LlamaForSequenceClassification(tiny.config).eval()
    reward.config.pad_token_id = pad
    reward.model.load_state_dict(tiny.policy.model.state_dict())
    reward.score.load_state_dict(tiny.value_head.state_dict())
    ids, mask = padded(ROWS, 8, pad)
    answers = [{"prompt": row[:1], "ids": row[1:], "finished": True} for row in ROWS]
    read, columns = as_trained(ids, answers, 2, pad)
    assert torch.equal(read, ids)
    outputs = tiny.value_head(tiny.hidden("value", ids)).squeeze(-1)
    found = outputs.gather(1, columns.unsqueeze(1)).squeeze(1)
    close(found, reward(input_ids=ids, attention_mask=mask).logits[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_behind_a_row_needs_no_mask(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path)).eval()
    together = model(input_ids=padded(ROWS, 8, 1)[0], use_cache=False).logits
    for row, found in zip(ROWS, together, strict=True):
        alone = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        close(found[: len(row)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bloom", "llama4", "mixtral"])
def test_the_trunk_ends_with_hidden_states(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path))
    found = trunk(model)(torch.tensor(ROWS[:1]), output_hidden_states=True)
    assert torch.equal(found.last_hidden_state, found.hidden_states[-1])


PROMPTS = [[3 + (7 * i) % 90 for i in range(length)] for length in (6, 9, 32, 7, 20)]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_before_a_prompt_changes_nothing(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(family, tmp_path)).eval()
    kept = model.generation_config
    assert takes_padding(model, ModelArguments(str(tmp_path)).load_tokenizer(), PROMPTS)
    assert model.generation_config is kept


@pytest.mark.parametrize(("dtype", "taken"), [(torch.float32, False), (torch.bfloat16, True)])
def test_padding_that_moves_logits_by_hundredths_is_rounding_in_bf16_alone(dtype, taken, tmp_path):
    def nudge(module, inputs, named, outputs):
        if (seen := named.get("attention_mask")) is not None:  # not given where nothing is padding
            outputs.logits = torch.where((seen == 0).any(-1)[:, None, None], 1.02, 1.0) * outputs.logits
        return outputs

    model = AutoModelForCausalLM.from_pretrained(save_tiny("llama", tmp_path), dtype=dtype).eval()
    model.register_forward_hook(nudge, with_kwargs=True)
    assert takes_padding(model, ModelArguments(str(tmp_path)).load_tokenizer(), PROMPTS) == taken


def test_padding_that_is_seen_behind_a_cache(tmp_path):
    tokenizer = ModelArguments(save_tiny("llama", tmp_path)).load_tokenizer()
    config = MiniMaxConfig(num_local_experts=2, layer_types=["linear_attention", "full_attention"], **SMALL)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    assert not takes_padding(model, tokenizer, PROMPTS)


def test_chunks():
    prompts = [[1], [1, 2, 3], [2], [1, 2], [3], [2, 3]]
    assert chunks(prompts, 2, padding=True) == [[0, 2], [4, 3], [5, 1]]
    assert chunks(prompts, 2, padding=False) == [[0, 2], [4], [3, 5], [1]]


# updates

RANDOM = (  # in training: a router, noise on its input, dropout by a function
    PhimoeConfig(num_local_experts=4, **SMALL),
    MixtralConfig(num_local_experts=4, router_jitter_noise=0.5, **SMALL),
    FalconConfig(hidden_dropout=0.5, **SMALL),
)


@pytest.mark.parametrize("config", RANDOM, ids=lambda config: config.model_type)
def test_nothing_is_random_in_training(config):
    """Though activations are recomputed, which layers do in training mode alone."""
    policy, calls = AutoModelForCausalLM.from_config(config), []
    disable_dropout(policy)
    model = ActorCritic(policy, score_head(16, None), None, lora=False, critic="head")
    model.activation_checkpointing_enable()
    layer = next(module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer))
    next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    evaluated, trained = (model.train(mode).policy(torch.tensor(ROWS[1:2])).logits for mode in (False, True))
    assert torch.equal(evaluated, trained)
    calls.clear()
    trained.sum().backward()
    assert calls, "nothing was recomputed"


# 3 tokens of 2 answers, each old probability e^-1 and value 1: ratios 1.25, 1, .5 and values 1.4, 1, 1.1
# policy: max(-3.75, -3.6), 6, max(1.5, 2.4) make 4.8, and with a clip of .3 max(-3.75, -3.9), 6, max(1.5, 2.1) 4.35
# value: .5 max(.36, .64), 4.5, .605 make 5.425, and with a clip of .5 .18, 4.5, .605 5.285
@pytest.mark.parametrize(
    ("flags", "policy", "value", "of_logp", "of_values"),
    [
        ({}, 4.8, 5.425, [0, 6, 0], [0, -0.3, 0.11]),
        ({"clip_range": 0.3}, 4.35, 5.425, [-3.75, 6, 0], [0, -0.3, 0.11]),
        ({"value_clip_range": 0.5}, 4.8, 5.285, [0, 6, 0], [-0.06, -0.3, 0.11]),
        ({"value_coef": 0.2}, 4.8, 5.425, [0, 6, 0], [0, -0.6, 0.22]),
    ],
    ids=["defaults", "clip_range", "value_clip_range", "value_coef"],
)
def test_update_by_hand(flags, policy, value, of_logp, of_values, tmp_path):
    """Losses and gradients are means over the tokens of all answers, however these are cut."""
    logp = (torch.tensor([1.25, 1, 0.5]).log() - 1).requires_grad_()
    values = torch.tensor([1.4, 1, 1.1], requires_grad=True)
    answers = {"at": [0, 1, 2], "logp": [-1.0] * 3, "values": [1.0] * 3}
    answers |= {"advantages": [3.0, -6, -3], "returns": [2.0, 4, 0]}
    answers = [
        {"prompt": [7], "ids": [7] * (end - start)}
        | {name: torch.tensor(all[start:end]) for name, all in answers.items()}
        for start, end in ((0, 1), (1, 3))
    ]
    trainer = PPOTrainer.__new__(PPOTrainer)
    trainer.args = PPOArguments(str(tmp_path), use_cpu=True, micro_batch_size=1, **flags)
    trainer.processing_class, trainer.policy_stopped, trainer.stats = SimpleNamespace(pad_token_id=0), False, []
    trainer.accelerator = SimpleNamespace(backward=torch.Tensor.backward, reduce=lambda sums, reduction: sums)
    trainer.model = SimpleNamespace(
        token_logp=lambda name, batch, temperature: (logp[batch["at"]], None),
        token_values=lambda batch: values[batch["at"]],
    )
    coef = trainer.args.value_coef
    close(trainer.update(answers), (policy + coef * value) / 3)
    close(logp.grad, [gradient / 3 for gradient in of_logp])
    close(values.grad, [gradient / 3 for gradient in of_values])
    moved = -math.log(1.25 * 0.5) / 3
    assert trainer.stats == [pytest.approx({"policy_loss": policy / 3, "value_loss": value / 3, "step_kl": moved})]


# arguments


@pytest.mark.parametrize(
    "flags",
    [{"save_strategy": "best"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}, {"lr_scheduler_type": "greedy"}],
)
def test_what_follows_a_metric_follows_the_reward(flags, tmp_path):
    args = PPOArguments(str(tmp_path), eval_strategy="steps", eval_steps=1, use_cpu=True, **flags)
    assert (args.metric_for_best_model, args.greater_is_better) == ("reward", True)
    assert ("lr_scheduler_type" in flags) == (args.lr_scheduler_kwargs == {"mode": "max"})
    assert PPOArguments(str(tmp_path), use_cpu=True).metric_for_best_model is None


def test_noise_does_not_suit_rl(tmp_path):
    with pytest.raises(UserError, match="^--neftune_noise_alpha: "):
        PPOArguments(str(tmp_path), use_cpu=True, neftune_noise_alpha=5)


# batches


def test_collate():
    answers = [
        {"prompt": [1, 2], "ids": [3], "score": 0.5, "logp": torch.tensor([-0.1])},
        {"prompt": [4], "ids": [5, 6, 7], "score": 1.5, "logp": torch.tensor([-0.2, -0.3, -0.4])},
    ]
    batch = {name: tensor.tolist() for name, tensor in collate(answers, 9, "cpu").items()}
    assert batch.pop("logp") == [pytest.approx([-0.1, 0, 0]), pytest.approx([-0.2, -0.3, -0.4])]
    assert batch == {
        "ids": [[1, 2, 3, 9], [4, 5, 6, 7]],
        "tokens": [[3, 0, 0], [5, 6, 7]],
        "answer_mask": [[1, 0, 0], [1, 1, 1]],
        "columns": [[1, 2, 2], [0, 1, 2]],  # where each token is predicted; padding points inside
    }


# sampling


def test_sampling_is_the_inverse_of_the_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.7]]).log()
    for number, token in ((0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 3), (1 - 2**-53, 3)):
        numbers = torch.tensor([[0.5, number]], dtype=torch.float64)
        found = InverseTransformSampling(numbers, 2, 1.0)(torch.zeros(1, 3, dtype=torch.long), logits)
        assert found.argmax().item() == token and found.isfinite().sum() == 1


def test_sampled_shares_are_the_probabilities():
    logits, rows = torch.tensor([0.0, 1.0, 2.0, -1.0]), 20000
    numbers = uniforms([f"row {i}" for i in range(rows)], 1)
    found = InverseTransformSampling(numbers, 5, 2.0)(torch.zeros(rows, 5, dtype=torch.long), logits.expand(rows, 4))
    shares = found.argmax(1).bincount(minlength=4) / rows
    close(shares, (logits / 2).softmax(0), atol=0.01, rtol=0)


def test_uniforms_depend_on_their_seed_alone():
    both, one = uniforms(["a", "b"], 5), uniforms(["b"], 3)
    assert torch.equal(both[1, :3], one[0]) and not torch.equal(both[0], both[1])
    assert both.min() >= 0 and both.max() < 1


# what is logged


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 3], [5, 99]]), torch.tensor([[1.0, 1], [1, 0]])
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.zeros(2, 2), returns, mask).item() == 0.0
    # values 2, 4, 3 leave -1, -1, 2: variance 3, of 4
    assert explained_variance(torch.tensor([[2.0, 4], [3, 0]]), returns, mask).item() == pytest.approx(0.25)


def test_one_token_has_no_variance():
    assert explained_variance(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1.0, 0]])).item() == 0.0


def test_figures_of_a_rollout():
    half = torch.full((4,), 0.5)
    repeats = {"score": 1.0, "ids": [5, 6, 5, 6], "finished": True, "logp": -half, "ref_logp": -2 * half}
    ends = {"score": 4.0, "ids": [7, 8], "finished": False, "logp": -2 * half[:2], "ref_logp": -half[:2]}
    answers = [repeats | {"entropy": half, "scores": {"model": 1.0, "rule": 0.0}}]
    answers += [ends | {"entropy": 2 * half[:2], "scores": {"model": 3.0, "rule": 1.0}}]
    figures = {"reward": 2.5, "reward_std": 1.5, "reward_length": -1, "kl": (4 * 0.5 - 2 * 0.5) / 2, "entropy": 4 / 6}
    figures |= {"length": 3, "eos_rate": 0.5, "distinct_2": (2 / 3 + 1) / 2}
    assert describe(answers, ["model"]) == pytest.approx(figures)
    assert describe(answers, ["model", "rule"]) == pytest.approx(figures | {"reward_model": 2, "reward_rule": 0.5})


def test_kl_estimates():
    logp, ref_logp = torch.tensor([math.log(0.5), math.log(0.2)]), torch.tensor([math.log(0.25), math.log(0.4)])
    half = math.log(2)
    close(kl_estimate(logp, ref_logp, "k1"), [half, -half])
    close(kl_estimate(logp, ref_logp, "k2"), [half**2 / 2, half**2 / 2])
    close(kl_estimate(logp, ref_logp, "k3"), [0.5 - 1 + half, 2 - 1 - half])


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_kl_estimates(estimator):
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
    expected = (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum()
    close(expected, (policy * (policy / reference).log()).sum())


def test_distinct():
    assert distinct([1, 2, 3], 2) == 1.0
    assert distinct([1, 2, 1, 2, 1], 2) == 0.5  # 12 21 12 21
    assert distinct([7], 2) == 1.0


def test_correlation():
    assert correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 1], [1, 2]) == 0.0


# guards

HEALTHY = {"reward": 0.0, "kl": 1.0, "length": 50.0, "eos_rate": 0.8, "distinct_2": 0.9, "reward_length": 0.1}


@pytest.mark.parametrize(
    ("changes", "fired"),
    [
        ({}, []),
        ({"kl": 31.0}, ["kl"]),
        ({"kl": float("nan")}, ["not_finite"]),
        ({"reward": float("inf")}, ["not_finite"]),
        ({"distinct_2": 0.2}, ["repetition"]),
        ({"eos_rate": 0.19}, ["eos"]),
        ({"length": 101.0}, ["length"]),
        ({"length": 24.0}, ["length"]),
        ({"reward_length": -0.9}, ["correlation"]),
    ],
)
def test_alarms(changes, fired):
    history = [HEALTHY] * 5 + [HEALTHY | changes] * 5
    assert list(GuardArguments().alarms(history, 8)) == fired
    off = GuardArguments(guard_kl=0, guard_repetition=0, guard_eos=0, guard_length=0, guard_correlation=0)
    assert list(off.alarms(history, 8)) == [guard for guard in fired if guard == "not_finite"]


def test_a_run_may_go_on_without_a_reward_function():
    history = [HEALTHY | {"reward_dropped": 1.0}] * 3 + [HEALTHY | {"reward_new": 1.0}] * 7
    assert GuardArguments().alarms(history, 8) == {}
    assert list(GuardArguments().alarms([*history, *[HEALTHY | {"length": 101.0}] * 5], 8)) == ["length"]


def test_one_odd_rollout_is_no_drift():
    odd = HEALTHY | {"length": 150.0, "eos_rate": 0.1, "reward_length": 1.0}
    assert GuardArguments().alarms([HEALTHY] * 9 + [odd], 8) == {}
    assert GuardArguments().alarms([odd], 8) == {}


def test_few_ends_are_no_evidence():
    """8 answers of which one in twenty ends: none in five rollouts is not rare."""
    rare = HEALTHY | {"eos_rate": 0.05}
    assert GuardArguments().alarms([rare] * 5 + [rare | {"eos_rate": 0.0}] * 5, answers=8) == {}
    assert list(GuardArguments().alarms([rare] * 5 + [rare | {"eos_rate": 0.0}] * 5, answers=80)) == ["eos"]


def test_guards_stop_or_warn(tmp_path):
    found = {"kl": "too much", "length": "grew"}
    assert GuardArguments().stop_for(found, 8, tmp_path)
    assert not GuardArguments().stop_for({"length": "grew"}, 8, tmp_path)
    assert not GuardArguments(guards="warn").stop_for(found, 8, tmp_path)
    assert not GuardArguments(guards="off").stop_for(found, 8, tmp_path)
    told = [json.loads(line) for line in (tmp_path / "guards.jsonl").read_text().splitlines()]  # each thing once
    assert [(line["guard"], line["stopped"]) for line in told] == [("kl", True), ("length", False), ("kl", False)]
