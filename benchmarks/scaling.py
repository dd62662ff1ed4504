"""How cost grows: PT over block size, batch, model size and ranks, in tokens/s and GiB; SFT's start over records.

    python benchmarks/scaling.py --model models/SmolLM2-135M-Instruct --plot docs/scaling.png
    python benchmarks/scaling.py --model models/SmolLM2-135M-Instruct --axes ranks

Every point is a process of its own, of the script as scripts/env.sh starts it, on data/pretrain; the first step, which
warms up, is not counted. Models of other sizes are llamas of random weights, with this one's tokenizer. Prints
markdown.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, as_run_scripts, machine, measure

from data import sft, write_rows

TOKENS = 8192  # trained in a point, in at least three steps
BLOCK, BATCH = 512, 4
# hidden size, layers: with the 49,152 words of SmolLM2 these are 19, 135 and 362 million weights
SIZES = {"19M": (256, 8), "135M": (576, 30), "362M": (960, 32)}
AXES = {
    "block_size": [128, 256, 512, 1024, 2048, 4096],
    "batch": [1, 2, 4, 8, 16, 32],
    "weights": list(SIZES),
    "ranks": [1, 2],
    "records": [1_000, 10_000, 100_000, 1_000_000],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--axes", default=",".join(AXES), help="comma list")
    parser.add_argument("--plot", type=Path, help="PNG to write, one panel an axis")
    return parser.parse_args()


def random_model(folder: Path, tokenizer: str, hidden: int, layers: int) -> Path:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pt_point(model, block: int, batch: int, ranks: int, folder: Path, environment: dict) -> tuple[float, float]:
    """Tokens a second after the first step, and peak GiB of all processes."""
    steps = 1 + max(3, TOKENS // (block * batch * ranks))
    command = [sys.executable, "pretraining.py"]
    if ranks > 1:  # torchrun would give each one thread as well
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "pretraining.py"]
        environment = environment | {"OMP_NUM_THREADS": "1"}
    command += ["--model_name_or_path", model, "--train_file_dir", ROOT / "data/pretrain/train"]
    command += ["--validation_file_dir", ROOT / "data/pretrain/validation", "--output_dir", folder / "output"]
    command += ["--block_size", block, "--per_device_train_batch_size", batch, "--max_steps", steps]
    command += ["--logging_steps", 1, "--do_eval", False, "--save_strategy", "no", "--report_to", "none", "--fresh"]
    _, memory, _ = measure([*command, "--use_cpu", True], environment)
    state = json.loads((folder / "output/trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    return block * batch * ranks * (steps - 1) / sum(row["step_seconds"] for row in rows[1:]), memory


def measured(axis: str, args, folder: Path, environment: dict) -> list[tuple[str, float, float]]:
    """(value, tokens a second, GiB) of each point; for records the seconds of a cold start to the first step's end."""
    points = []
    for value in AXES[axis]:
        started = time.perf_counter()
        point = {"model": args.model, "block": BLOCK, "batch": BATCH, "ranks": 1}
        if axis == "block_size":  # the same tokens in a step
            point |= {"block": value, "batch": max(1, BLOCK * BATCH // value)}
        elif axis == "batch":
            point |= {"block": 128, "batch": value}
        elif axis == "weights":
            point["model"] = random_model(folder / f"model-{value}", args.model, *SIZES[value])
        elif axis == "ranks":  # the same global batch
            point |= {"ranks": value, "batch": BATCH // value}
        if axis == "records":
            write_rows(folder / "rows.jsonl", value)
            held_out, flags = ROOT / "data/finetune/validation", ("--max_steps", 1, "--per_device_train_batch_size", 1)
            command = sft(args, folder / "rows.jsonl", held_out, folder / f"sft-{value}", *flags)
            figure, memory, _ = measure(command, environment)
        else:
            figure, memory = pt_point(**point, folder=folder, environment=environment)
        points.append((str(value), figure, memory))
        seconds = time.perf_counter() - started
        print(f"{axis} {value}: {figure:.1f}, {memory:.2f} GiB; took {seconds:.0f} s", file=sys.stderr, flush=True)
    return points


def plot(found: dict[str, list], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3), squeeze=False)
    for panel, (axis, points) in zip(panels[0], found.items(), strict=True):
        labels, speeds, memory = zip(*points, strict=True)
        unit = "seconds to the first step" if axis == "records" else "tokens/s"
        panel.plot(labels, speeds, "o-", color="tab:blue")
        panel.set(xlabel=axis, title=unit, ylim=(0, 1.1 * max(speeds)))
        panel.title.set_color("tab:blue")
        panel.tick_params("x", rotation=30)
        other = panel.twinx()
        other.plot(labels, memory, "s--", color="tab:orange")
        other.set(ylim=(0, 1.1 * max(memory)))
        other.set_ylabel("GiB at the peak", color="tab:orange")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    args = arguments()
    print(machine(), end="\n\n")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = as_run_scripts() | {"HF_DATASETS_CACHE": str(folder / "cache")}
        for axis in args.axes.split(","):
            found[axis] = measured(axis, args, folder, environment)
            unit = "seconds to the end of the first step" if axis == "records" else "tokens/s"
            print(f"| {axis} | {unit} | GiB at the peak |\n|---|---|---|")
            for value, figure, memory in found[axis]:
                print(f"| {value} | {figure:.0f} | {memory:.2f} |")
            print(flush=True)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
