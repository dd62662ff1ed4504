"""Curves of what a run logged, as PNG files."""

from pathlib import Path


def points_of(log_history: list[dict], name: str) -> dict[str, list[tuple[int, float]]]:
    """Of a quantity the (step, value) that were logged, by "train" and "held out"; without those that never were."""
    found = {}
    for label, key in (("train", name), ("held out", f"eval_{name}")):
        points = [(row["step"], row[key]) for row in log_history if isinstance(row.get(key), int | float)]
        found |= {label: points} if points else {}
    return found


def plot_curves(log_history: list[dict], folder: Path) -> None:
    """Write training_{name}.png for every quantity that training or evaluation logged at least twice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timings = ("runtime", "per_second", "step_seconds", "_gib", "flos", "epoch", "step", "num_tokens")
    names = {key.removeprefix("eval_") for row in log_history for key in row}
    for name in sorted(
        n for n in names if not n.endswith(timings) and not n.startswith(("train_", "seconds_", "accuracy_"))
    ):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for label, points in points_of(log_history, name).items():
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set(xlabel="optimizer step", ylabel=name.replace("_", " "))
        if axes.lines and max(len(line.get_xdata()) for line in axes.lines) > 1:
            axes.legend()
            figure.savefig(folder / f"training_{name.replace('/', '_')}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
