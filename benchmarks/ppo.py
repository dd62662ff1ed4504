"""PPO here and in TRL 1.12, the last TRL that had it: same models, prompts, lengths, batches, epochs and episodes.

    python benchmarks/ppo.py --model outputs/sft-merged --reward_model outputs/rm

Runs the contestants in turn, each in a process of its own, and prints their medians as one markdown table: episodes a
second and what took the time, peak memory of the process, and the reward of each rollout. TRL gets an environment of
its own in benchmarks/.trl112. Both train LoRA of rank 8 on all linear layers; TRL's value and reward models are whole
copies of the merged reward model, which is how its trainer works. Its reward holds the penalty for a missing end, ours
does not. Ours runs as scripts/run_rl.sh starts it, with glibc keeping freed memory; TRL as its users do, and once more
with that setting ("kept memory").
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import ROOT, as_run_scripts, environment_of, machine, measure

TRL_PACKAGES = ["torch==2.13.0", "trl==1.12.0", "transformers==5.23.0", "peft==0.21.2", "accelerate", "datasets"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the SFT model")
    parser.add_argument("--reward_model", required=True, help="folder of the reward adapter trained on it")
    parser.add_argument("--prompts", default=str(ROOT / "data/prompts/train"), help="folder of prompt records")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts in a rollout and in an optimizer step")
    parser.add_argument("--new_tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--ppo_epochs", type=int, default=4)
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contestant")
    parser.add_argument("--contestants", default="ours bf16,ours fp32,TRL 1.12 fp32,TRL 1.12 fp32 kept memory")
    return parser.parse_args()


def write_prompts(args, folder: Path) -> list[list[int]]:
    """One record for each episode into `folder`/prompts, and their token ids, which TRL's script gets."""
    sys.path.insert(0, str(ROOT))
    from arguments.data import DataArguments
    from arguments.model import ModelArguments

    data_args = DataArguments(train_file_dir=args.prompts, max_source_length=256)
    rows, _ = data_args.load_prompts()
    rows = rows.select(range(args.batch_size * args.rollouts))
    lines = [json.dumps({"prompt": row["prompt"]}, ensure_ascii=False) for row in rows]
    (folder / "prompts" / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = ModelArguments(model_name_or_path=args.model).load_tokenizer()
    return [data_args.encode_prompt(tokenizer, row["prompt"])["input_ids"] for row in rows]


def merged_reward_model(args, folder: Path) -> str:
    """The reward adapter merged into its base: the form that TRL's trainer takes."""
    command = [sys.executable, "merge_peft_adapter.py", "--base_model_name_or_path", args.model]
    command += ["--peft_model_path", args.reward_model, "--output_dir", str(folder / "rm")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return str(folder / "rm")


def our_command(args, precision: str, folder: Path, output: Path) -> list:
    command = [sys.executable, "rl_training.py", "--model_name_or_path", args.model]
    command += ["--reward_model_name_or_path", args.reward_model, "--train_file_dir", folder / "prompts"]
    command += ["--output_dir", output, "--do_eval", False, "--precision", precision, "--max_source_length", 256]
    command += ["--max_target_length", args.new_tokens, "--batch_size", args.batch_size]
    command += ["--ppo_epochs", args.ppo_epochs, "--max_steps", args.rollouts, "--learning_rate", 3e-4]
    return command + ["--save_strategy", "no", "--guards", "warn", "--report_to", "none"]


def our_training(output: Path) -> dict:
    """Seconds of training, and what each rollout logged."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    seconds = json.loads((output / "train_results.json").read_text())["train_runtime"]
    return {"seconds": seconds, "rollouts": [row for row in history if "reward" in row]}


def run(contestant: str, args, folder: Path, prompts: Path, reward_model: str, number: int) -> dict:
    """One run: figures of its training, without the loading, and of the whole process."""
    output = folder / f"run-{number}"
    output.mkdir()
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    if contestant.startswith("ours"):
        environment = as_run_scripts()
        seconds, memory, _ = measure(our_command(args, contestant.split()[-1], folder, output), environment)
        training = our_training(output)
    else:
        settings = vars(args) | {"reward_model": reward_model, "prompts": str(prompts), "output": str(output)}
        (output / "settings.json").write_text(json.dumps(settings))
        environment |= as_run_scripts() if "kept memory" in contestant else {}
        python = environment_of(".trl112", TRL_PACKAGES) / "python"
        command = [python, ROOT / "benchmarks" / "ppo_trl.py", output / "settings.json"]
        seconds, memory, _ = measure(command, environment)
        training = json.loads((output / "training.json").read_text())
    rollouts = training["rollouts"]
    found = {key: sum(row[f"seconds_{key}"] for row in rollouts) for key in ("generate", "score", "update")}
    return found | {
        "episodes/s": args.batch_size * len(rollouts) / training["seconds"],
        "GiB": memory,
        "whole run": seconds,
        "rewards": [row["reward"] for row in rollouts],
    }


def table(results: dict[str, list[dict]]) -> str:
    """Medians over the runs, one line a contestant; in brackets the lowest and highest."""
    columns = ["episodes/s", "generate", "score", "update", "whole run", "GiB"]
    lines = ["| | " + " | ".join(columns) + " | reward of each rollout |", "|---" * (len(columns) + 2) + "|"]
    for contestant, runs in results.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs]
            cells.append(f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})")
        rewards = [statistics.fmean(column) for column in zip(*(run["rewards"] for run in runs), strict=True)]
        lines.append(f"| {contestant} | {' | '.join(cells)} | {' '.join(f'{r:.2f}' for r in rewards)} |")
    return "\n".join(lines)


def main():
    args = arguments()
    environment_of(".trl112", TRL_PACKAGES)
    results = {contestant: [] for contestant in args.contestants.split(",")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts").mkdir()
        (folder / "prompts.json").write_text(json.dumps(write_prompts(args, folder)))
        reward_model = merged_reward_model(args, folder)
        for number in range(args.repeats):
            for contestant, runs in results.items():
                run_number = number * len(results) + list(results).index(contestant)
                runs.append(run(contestant, args, folder, folder / "prompts.json", reward_model, run_number))
                print(f"{contestant}: {runs[-1]}", file=sys.stderr, flush=True)
    print(f"{machine()}\n\n{table(results)}")


if __name__ == "__main__":
    main()
