"""PPO against a rule with a known answer: does the policy learn to answer in exactly one sentence?

    python benchmarks/rule.py --model outputs/sft-merged

Runs scripts/run_rl.sh with `one_sentence` for a reward, whose maximum is 1, and prints the share of held-out answers
that keep the rule before, during and after training, with KL and length.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[\u3002\uff01\uff1f]")


def one_sentence(completions: list[list[dict]], **columns) -> list[float]:
    """1 for a text with one sentence end, which stands at its end; else 0."""
    texts = [turns[-1]["content"].strip() for turns in completions]
    ends = [[match.end() for match in SENTENCE_END.finditer(text)] for text in texts]
    return [float(found == [len(text)]) for found, text in zip(ends, texts, strict=True)]


def main():
    from measure import ROOT, machine  # not where the stage loads the function above: its path has no benchmarks/

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the SFT model")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "rl"
        command = ["bash", "scripts/run_rl.sh", "--reward_model_name_or_path", "", "--seed", args.seed]
        command += ["--reward_functions", f"{__file__}:one_sentence", "--max_steps", args.rollouts]
        # whitened advantages of answers that nearly all keep the rule are mostly noise: the rate ends at 0
        command += ["--lr_scheduler_type", "linear", "--max_eval_samples", 48]
        command += ["--eval_strategy", "steps", "--eval_steps", args.rollouts // 2]
        folders = {"MODEL": args.model, "OUTPUT": str(output), "MERGED": str(Path(name) / "merged")}
        environment = os.environ | folders | {"PYTHON": sys.executable}
        subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, check=True)
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        guards = output / "guards.jsonl"
        print(f"{machine()}\n\n| steps | rule kept | KL | length | answers that end |\n|---|---|---|---|---|")
        for row in history:
            if "eval_reward" in row:
                figures = (f"{row[f'eval_{key}']:.3f}" for key in ("reward", "kl", "length", "eos_rate"))
                print(f"| {row['step']} | {' | '.join(figures)} |")
        print(f"\nguards that fired:\n{guards.read_text()}" if guards.exists() else "\nno guard fired")


if __name__ == "__main__":
    main()
