"""The closing table of the pipeline: every stage on held-out data, before and after, with sample counts."""

from pathlib import Path

from arguments.atomic import read_json

# stage, what is measured, key before, key after, what the count counts, its key
ROWS = (
    ("PT", "perplexity, unseen documents", "eval_perplexity_before", "eval_perplexity", "tokens", "eval_tokens"),
    ("SFT", "loss, unseen answers", "eval_loss_before", "eval_loss", "tokens", "eval_tokens"),
    ("RM", "accuracy, unseen pairs", "eval_accuracy_before", "eval_accuracy", "pairs", "eval_pairs"),
    ("RM", "margin, unseen pairs", "eval_margin_before", "eval_margin", "pairs", "eval_pairs"),
    ("RM", "'longer wins', in tokens", "", "eval_longer_wins", "pairs", "eval_pairs"),
    ("RM", "'longer wins', in characters", "", "eval_longer_wins_characters", "pairs", "eval_pairs"),
    ("RL", "reward, unseen prompts", "eval_reward_before", "eval_reward", "prompts", "eval_prompts"),
    ("RL", "KL to the SFT model, nats", "eval_kl_before", "eval_kl", "prompts", "eval_prompts"),
    ("RL", "answer length, tokens", "eval_length_before", "eval_length", "prompts", "eval_prompts"),
    ("RL", "answers that end", "eval_eos_rate_before", "eval_eos_rate", "prompts", "eval_prompts"),
)


def table_rows(folders: dict[str, Path], outputs: Path) -> list[tuple[str, str, str, str, str]]:
    """Stage, what, before, after, n; of the stages that have ended. `folders` are theirs, by pt, sft, rm, rl."""
    paths = {name.upper(): folder / "all_results.json" for name, folder in folders.items()}
    results = {name: read_json(path) or {} for name, path in paths.items()}
    rows = []
    for stage, what, before, after, unit, count in ROWS:
        found = results.get(stage, {})
        if after in found:
            rows.append((stage, what, number(found.get(before)), number(found[after]), f"{found[count]} {unit}"))
    rows += kind_rows(results.get("RM", {}))
    return rows + quiz_rows(outputs / "quiz.json") + general_rows(outputs / "perplexity.json")


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def kind_rows(results: dict) -> list[tuple]:
    """The reward model's accuracy on each kind of rejected answer."""
    keys = [key for key in results if key.startswith("eval_accuracy_") and not key.endswith("_before")]
    names = {key: key.removeprefix("eval_accuracy_").replace("_", " ") for key in keys}
    return [
        ("RM", f"accuracy, {names[key]}", number(results.get(f"{key}_before")), number(results[key]), "")
        for key in sorted(keys)
    ]


def judged(path: Path) -> list[dict]:
    """A script's results for each model; empty if it has not ended."""
    return list((read_json(path) or {}).values())


def quiz_rows(path: Path) -> list[tuple]:
    """Accuracy of the base, PT and SFT models on the quiz."""
    found = judged(path)
    if not found:
        return []
    base, pt, sft = (number(row["accuracy"]) for row in found)
    count = f"{found[0]['questions']} questions"
    chance = found[0].get("chance")  # an older quiz.json has none
    what = "quiz accuracy" + (f" (chance: {chance:.2f})" if chance else "")
    return [("PT", what, base, pt, count), ("SFT", what, pt, sft, count)]


def general_rows(path: Path) -> list[tuple]:
    """Perplexity of text that has nothing to do with the domain: what each stage forgot."""
    found = judged(path)
    figures = [number(row["perplexity"]) for row in found]
    return [
        (stage, "perplexity, general text", before, after, f"{found[0]['tokens']} tokens")
        for stage, before, after in zip(("PT", "SFT", "RL"), figures, figures[1:], strict=False)
    ]
