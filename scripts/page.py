"""One self-contained page of what the pipeline, or one stage, did: report.html opens from the disk, without a network.

    python scripts/page.py outputs        # the pipeline
    python scripts/page.py outputs/rl     # one stage

Reads what the stages left: all_results.json, trainer_state.json, data.json, run.json, margins.jsonl (RM), scores.jsonl
and guards.jsonl (RL); of the pipeline also ledger.jsonl, quiz.json, perplexity.json and answers.json.
"""

import io
import math
import statistics
import sys
import time
from itertools import takewhile
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments.atomic import read_json, read_lines  # noqa: E402
from arguments.curves import points_of  # noqa: E402
from scripts.ledger import entries  # noqa: E402
from scripts.table import table_rows  # noqa: E402

matplotlib.use("Agg")
matplotlib.rcParams |= {
    "svg.fonttype": "none",  # text stays text: the reader's own fonts, Chinese too
    "svg.hashsalt": "report",
    "text.color": "#888",
    "axes.edgecolor": "#888",
    "axes.labelcolor": "#888",
    "xtick.color": "#888",
    "ytick.color": "#888",
}
SCRIPTS = {
    "pretraining.py": "pt",
    "supervised_finetuning.py": "sft",
    "reward_modeling.py": "rm",
    "rl_training.py": "rl",
}
STAGES = tuple(SCRIPTS.values())
CURVES = {
    "pt": ("loss", "perplexity", "learning_rate"),
    "sft": ("loss", "learning_rate"),
    "rm": ("loss", "accuracy", "margin"),
    "rl": ("reward", "kl", "length", "eos_rate", "entropy", "distinct_2", "win_rate", "explained_variance"),
}


def found_in(path: Path) -> dict:
    """What a JSON file holds; nothing if it is missing or was cut short."""
    return read_json(path) or {}


def svg(title: str, draw) -> str:
    """An SVG element of what `draw(axes)` draws."""
    figure, axes = pyplot.subplots(figsize=(5, 3))
    draw(axes)
    axes.set_title(title, fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    target = io.StringIO()
    figure.savefig(target, format="svg", transparent=True, bbox_inches="tight")
    pyplot.close(figure)
    return target.getvalue()[target.getvalue().index("<svg") :]


def curve(history: list[dict], name: str) -> str | None:
    """Training and held-out values of a quantity over the optimizer steps; None if there are none."""
    lines = points_of(history, name)

    def draw(axes):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_xlabel("optimizer step")

    return svg(name.replace("_", " "), draw) if lines else None


def histogram(title: str, groups: dict[str, list[float]]) -> str:
    """Of the numbers that are finite: a reward that is not ends a run, whose page is then wanted most."""

    def draw(axes):
        for label, values in groups.items():
            axes.hist([value for value in values if math.isfinite(value)], bins=20, alpha=0.5, label=label)

    return svg(title, draw)


def first_and_last(rows: list[dict], key: str, names: tuple[str, str]) -> dict[str, list[float]]:
    """What the last evaluation found, and the first one if nothing had been trained by then, each by its name."""
    before = {names[0]: rows[0][key]} if rows[0]["step"] == 0 else {}
    return before | {names[1]: rows[-1][key]}


def lengths(tokens: dict) -> str:
    """Histogram of the training rows by tokens, whose counts are known."""

    def draw(axes):
        axes.stairs(tokens["counts"], tokens["edges"], fill=True)
        axes.set(xlabel="tokens", ylabel="rows")

    return svg("lengths of the training rows", draw)


def calibration(margins: list[float]) -> str:
    """The share of pairs whose chosen answer wins against the probability that their margins predict, by fifths."""
    sure = sorted((1 / (1 + math.exp(-abs(margin))), margin > 0) for margin in margins)
    fifths = [sure[i * len(sure) // 5 : (i + 1) * len(sure) // 5] for i in range(5)]
    points = [tuple(map(statistics.fmean, zip(*fifth, strict=True))) for fifth in fifths if fifth]

    def draw(axes):
        axes.plot([0.5, 1], [0.5, 1], linestyle=":", color="#888", label="perfect")
        axes.plot(*zip(*points, strict=True), marker="o", label="this model")
        axes.set(xlabel="promised", ylabel="came true")

    return svg("calibration of the reward model", draw)


def plots(name: str, folder: Path) -> list[str]:
    history = found_in(folder / "trainer_state.json").get("log_history", [])
    found = [curve(history, quantity) for quantity in CURVES[name]]
    if tokens := found_in(folder / "data.json").get("tokens"):
        found.append(lengths(tokens))
    margins = read_lines(folder / "margins.jsonl")
    if margins:
        groups = first_and_last(margins, "margins", ("before", "after"))
        found += [histogram("margins of held-out pairs", groups), calibration(margins[-1]["margins"])]
        kinds = {k: v for k, v in found_in(folder / "all_results.json").items() if k.startswith("eval_accuracy_")}
        kinds = {k.removeprefix("eval_accuracy_"): v for k, v in kinds.items() if not k.endswith("before")}
        if kinds:
            found.append(
                svg("accuracy by kind of rejected answer", lambda axes: axes.barh(list(kinds), kinds.values()))
            )
    scores = read_lines(folder / "scores.jsonl")
    if scores:
        groups = first_and_last(scores, "scores", ("SFT model", "policy"))
        found.append(histogram("rewards of held-out prompts", groups))
    return [plot for plot in found if plot]


def describe(name: str, folder: Path, known: list[dict]) -> dict:
    """What the page says about a stage; `known` are its entries in the ledger."""
    results, last = found_in(folder / "all_results.json"), known[-1] if known else {}
    ended = last.get("event") == "finish" or (not known and results)
    seconds = last.get("seconds") or results.get("train_runtime")
    same = list(takewhile(lambda row: (row["inputs"], row["flags"]) == (last["inputs"], last["flags"]), known[::-1]))
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(same[-1]["time"])) if same else ""
    return {
        "name": name,
        "state": "ended" if ended else "begun" if known or folder.exists() else "to come",
        "seconds": f"{seconds / 60:.1f} min" if seconds else "",
        "memory": f"{results['peak_rss_gib']} GiB" if "peak_rss_gib" in results else "",
        "data": found_in(folder / "data.json"),
        "plots": plots(name, folder),
        "flags": " ".join(found_in(folder / "run.json").get("arguments", [])),
        "inputs": last.get("inputs", {}),
        "began": began,
    }


def write_page(outputs: Path) -> Path:
    """Write outputs/report.html, of one stage or of the pipeline, and return its path."""
    alone = SCRIPTS.get(found_in(outputs / "run.json").get("script"))  # None: a folder of stages
    folders = {alone: outputs} if alone else {name: outputs / name for name in STAGES}
    stages = [describe(name, folder, entries(outputs, name)) for name, folder in folders.items()]
    versions = [found_in(folder / "run.json").get("versions") for folder in folders.values()]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("page.html.jinja").render(
        title=f"Stage {alone.upper()}" if alone else "From base model to PPO",
        stages=stages,
        rows=table_rows(folders, outputs),
        guards=[row for folder in folders.values() for row in read_lines(folder / "guards.jsonl")],
        answers=read_json(outputs / "answers.json") or [],
        versions=next(filter(None, versions), {}),
    )
    target = outputs / "report.html"
    target.write_text(page, "utf-8")
    return target


def main():
    marks = ("ledger.jsonl", "run.json", *(f"{name}/run.json" for name in STAGES))
    if len(sys.argv) != 2:
        fault = f"expected one folder: python {sys.argv[0]} FOLDER"
    elif not any(Path(sys.argv[1], mark).exists() for mark in marks):
        fault = f"{sys.argv[1]} holds no ledger.jsonl of a pipeline, nor a stage's run.json: name such a folder"
    else:
        try:
            return print(f"see {write_page(Path(sys.argv[1]))}")
        except (OSError, ValueError) as error:  # a disk that cannot be written to, a damaged file
            fault = error
    print(f"error: {fault}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
