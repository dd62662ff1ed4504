"""Figures of sampled answers (reward, KL, length, repetition); rl_training.PPOTrainer says what an answer holds."""

import statistics
from collections.abc import Collection

import torch


def kl_estimate(logp, ref_logp, estimator: str):
    """Per-token estimates of KL(policy || reference) from the policy's samples (John Schulman, "Approximating KL").

    k1 is unbiased and can be negative, k2 has less variance and some bias, k3 is unbiased and never negative.
    """
    log_ratio = logp - ref_logp
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[estimator]


def mean_kl(answers: list[dict], estimator: str) -> float:
    """KL to the reference in nats per answer."""
    return statistics.fmean(kl_estimate(a["logp"], a["ref_logp"], estimator).sum().item() for a in answers)


def distinct(ids: list[int], n: int) -> float:
    """Share of different n-grams among all of an answer's (arXiv 1510.03055); 1 where it has none."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def correlation(first: list[float], second: list[float]) -> float:
    """Pearson's, or 0 where one side is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return torch.corrcoef(torch.tensor([first, second], dtype=torch.float64))[0, 1].item()


def describe(answers: list[dict], sources: Collection[str]) -> dict[str, float]:
    """Means over the answers: reward, KL (nats per answer), entropy (nats per token), length, repetition ...

    Of several reward `sources` each one's mean, too. The KL is k1 whatever is logged: the guards and the controller
    have limits in nats.
    """
    scores, lengths = [answer["score"] for answer in answers], [len(answer["ids"]) for answer in answers]
    figures = {
        "reward": statistics.fmean(scores),
        "reward_std": torch.tensor(scores, dtype=torch.float64).std(correction=0).item(),
        "reward_length": correlation(scores, lengths),
        "kl": mean_kl(answers, "k1"),
        "entropy": sum(answer["entropy"].sum().item() for answer in answers) / sum(lengths),
        "length": statistics.fmean(lengths),
        "eos_rate": statistics.fmean(answer["finished"] for answer in answers),
        "distinct_2": statistics.fmean(distinct(answer["ids"], 2) for answer in answers),
    }
    each = sources if len(sources) > 1 else ()
    return figures | {f"reward_{name}": statistics.fmean(a["scores"][name] for a in answers) for name in each}
