"""Figures of sampled answers (reward, KL, length, repetition); rl_training.PPOTrainer says what an answer holds."""

from collections.abc import Collection, Iterable, Sequence

import torch


def mean(values: Iterable[float]) -> float:
    """Their mean; NaN for both infinities together, at which statistics.fmean raises an error."""
    values = list(values)
    return sum(values) / len(values)


def win_rate(own: Sequence[float], others: Sequence[float]) -> float:
    """Share of pairs whose first number is the larger one; ties count half."""
    return mean((a > b) + 0.5 * (a == b) for a, b in zip(own, others, strict=True))


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each name, its mean over the rows that have it: a resumed run may have other reward functions than before."""
    names = {name for row in rows for name in row}
    return {name: mean(row[name] for row in rows if name in row) for name in sorted(names)}


def kl_estimate(logp, ref_logp, estimator: str):
    """Per-token estimates of KL(policy || reference) from the policy's samples (John Schulman, "Approximating KL").

    k1 is unbiased and can be negative, k2 has less variance and some bias, k3 is unbiased and never negative.
    """
    log_ratio = logp - ref_logp
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[estimator]


def mean_kl(answers: list[dict], estimator: str) -> float:
    """KL to the reference in nats per answer."""
    return mean(kl_estimate(a["logp"], a["ref_logp"], estimator).sum().item() for a in answers)


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
        "reward": mean(scores),
        "reward_std": torch.tensor(scores, dtype=torch.float64).std(correction=0).item(),
        "reward_length": correlation(scores, lengths),
        "kl": mean_kl(answers, "k1"),
        "entropy": sum(answer["entropy"].sum().item() for answer in answers) / sum(lengths),
        "length": mean(lengths),
        "eos_rate": mean(answer["finished"] for answer in answers),
        "distinct_2": mean(distinct(answer["ids"], 2) for answer in answers),
    }
    each = sources if len(sources) > 1 else ()
    return figures | {f"reward_{name}": mean(a["scores"][name] for a in answers) for name in each}
