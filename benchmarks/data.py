"""What the data costs: reading and tokenizing a million conversations, and padded, grouped and packed training.

    python benchmarks/data.py --model models/SmolLM2-135M-Instruct   # 100,000 and 1,000,000 rows, the latter 1 GB
    python benchmarks/data.py --model models/SmolLM2-135M-Instruct --rows --samples 64  # training only

Each measurement is a process of its own: a cold start that reads, checks and tokenizes, and a warm one that finds it
done; then SFT on data/finetune in three ways, alternating. Prints markdown.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

from measure import ROOT, as_run_scripts, machine, measure

WAYS = {
    "padded": ["--train_sampling_strategy", "random"],
    "grouped by length": ["--train_sampling_strategy", "group_by_length"],
    "packed": ["--packing", "--packing_length", "1024", "--per_device_train_batch_size", "1"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000], help="conversations to generate")
    parser.add_argument("--samples", type=int, default=96, help="conversations of each training; 0: skip that part")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def write_rows(path: Path, count: int) -> None:
    """Alpaca records of about 1,000 bytes, made of the words of the sample conversations, no two alike."""
    sample = (ROOT / "data/finetune/train/en_instructions.jsonl").read_text("utf-8").splitlines()
    words = " ".join(json.loads(line)["output"] for line in sample).split()
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            start = rng.randrange(len(words) - 200)
            question = f"Question {number}: {' '.join(words[start : start + 20])}?"
            answer = " ".join(words[start + 20 : start + rng.randrange(60, 200)])
            file.write(json.dumps({"instruction": question, "input": "", "output": answer}) + "\n")


def sft(args, data: Path, validation: Path, output: Path, *flags) -> list:
    command = [sys.executable, "supervised_finetuning.py", "--model_name_or_path", args.model]
    command += ["--train_file_dir", data, "--validation_file_dir", validation, "--output_dir", output]
    return [*command, "--report_to", "none", "--save_strategy", "no", "--do_eval", "False", *flags]


def rows_table(args, folder: Path, environment: dict) -> str:
    held_out = ROOT / "data/finetune/validation"
    head = "| conversations | GB | start | seconds to the end of the first step | conversations/s | GiB at the peak |"
    lines = [head, "|---|---|---|---|---|---|"]
    for count in args.rows:
        path = folder / f"rows-{count}.jsonl"
        write_rows(path, count)
        for start in ("cold", "warm"):
            output = folder / f"{start}-{count}"
            command = sft(args, path, held_out, output, "--max_steps", 1, "--per_device_train_batch_size", 1)
            seconds, memory, _ = measure(command, environment)
            size, speed = path.stat().st_size / 1e9, count / seconds
            lines.append(f"| {count:,} | {size:.2f} | {start} | {seconds:.0f} | {speed:,.0f} | {memory:.2f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def count_tokens(args, data: Path) -> int:
    """Tokens that a pass over the conversations trains on or reads, without padding."""
    sys.path.insert(0, str(ROOT))
    from arguments.data import DataArguments
    from arguments.model import ModelArguments
    from supervised_finetuning import build_dataset

    folders = {"train_file_dir": str(data / "train"), "validation_file_dir": str(data / "validation")}
    data_args = DataArguments(max_train_samples=args.samples, **folders)
    rows, _ = data_args.load_conversations()
    tokenizer = ModelArguments(model_name_or_path=args.model).load_tokenizer()
    return sum(build_dataset(rows, tokenizer, data_args)["length"])


def training_table(args, folder: Path, environment: dict) -> str:
    data = ROOT / "data/finetune"
    tokens, found = count_tokens(args, data), {way: [] for way in WAYS}
    for number in range(args.repeats):
        for way, flags in WAYS.items():
            output = folder / f"{way}-{number}".replace(" ", "-")
            common = ["--max_train_samples", args.samples, "--num_train_epochs", 1, "--per_device_train_batch_size", 8]
            command = sft(args, data / "train", data / "validation", output, *common, *flags)
            _, memory, _ = measure(command, environment)
            seconds = json.loads((output / "train_results.json").read_text())["train_runtime"]
            found[way].append((tokens / seconds, memory))
            print(f"{way}: {found[way][-1]}", file=sys.stderr, flush=True)
    lines = ["| rows | tokens/s without padding, median (all) | GiB at the peak |", "|---|---|---|"]
    for way, runs in found.items():
        speeds = sorted(speed for speed, _ in runs)
        every = ", ".join(f"{speed:.0f}" for speed in speeds)
        lines.append(f"| {way} | {statistics.median(speeds):.0f} ({every}) | {max(m for _, m in runs):.2f} |")
    return "\n".join(lines)


def main():
    args = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(machine(), end="\n\n")
        environment = as_run_scripts() | {"HF_DATASETS_CACHE": str(folder / "cache")}
        for wanted, table in ((args.rows, rows_table), (args.samples, training_table)):
            if wanted:
                print(table(args, folder, environment), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
