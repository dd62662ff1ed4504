"""What --torch_compile gains: training steps in turn with compiled layers and without, in one process.

    python benchmarks/compile.py --model models/SmolLM2-135M-Instruct

Each stage runs on the records and settings of speed.py; the batch of its first step is taken again and again. Prints a
markdown table: seconds of the step that compiles, with nothing compiled before and with what the run before it left,
then medians of both kinds of steps and of their ratio, pair by pair, as the machine may waver between them.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, as_run_scripts, machine
from speed import in_form_of, our_command, records


def print_seconds(command: list[str], repeats: int) -> None:
    """Run a stage to its first step, print {"first": seconds, "plain": of each step, "compiled": the same}, exit."""
    import transformers

    step = transformers.Trainer.training_step

    def timed(*call) -> float:
        started = time.perf_counter()
        step(*call)
        return time.perf_counter() - started

    def in_turn(trainer, model, inputs, *rest):
        layers = [layer for layer in model.modules() if layer._compiled_call_impl is not None]
        calls = [layer._compiled_call_impl for layer in layers]
        found = {"first": timed(trainer, model, dict(inputs), *rest), "plain": [], "compiled": []}
        for number in range(2 * repeats):
            name = ("plain", "compiled", "compiled", "plain")[number % 4]  # neither is always the one behind the other
            for layer, call in zip(layers, calls, strict=True):
                layer._compiled_call_impl = call if name == "compiled" else None
            found[name].append(timed(trainer, model, dict(inputs), *rest))
        print(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # the run itself is of no interest

    transformers.Trainer.training_step = in_turn
    sys.path.insert(0, str(ROOT))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def measured(stage: str, args, cache: str, repeats: int) -> dict:
    """What `print_seconds` prints, in a process of its own, started as the run scripts start a stage."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        rows = (in_form_of("ours", row) for row in records(stage, 48))
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (data / "rows.jsonl").write_text("".join(lines), "utf-8")
        command = our_command(stage, "ours", args, data, Path(folder) / "output")[1:] + ["--torch_compile"]
        environment = os.environ | as_run_scripts() | {"TORCHINDUCTOR_CACHE_DIR": cache}
        me = [sys.executable, __file__, "--model", args.model, "--repeats", str(repeats), "--command"]
        call = [*me, json.dumps([str(part) for part in command])]
        ended = subprocess.run(call, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(ended.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--stages", default="pt,sft,rm")
    parser.add_argument("--repeats", type=int, default=16)
    parser.add_argument("--command", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command:
        return print_seconds(json.loads(args.command), args.repeats)
    print(f"{machine()}\n\n| | first step, s | again, s | a step, s | compiled, s | faster by |")
    print("|---|---|---|---|---|---|")
    for stage in args.stages.split(","):
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = measured(stage, args, cache, 0), measured(stage, args, cache, args.repeats)
        plain, compiled = (statistics.median(warm[name]) for name in ("plain", "compiled"))
        gain = statistics.median(a / b for a, b in zip(warm["plain"], warm["compiled"], strict=True)) - 1
        print(f"| {stage} | {cold['first']:.0f} | {warm['first']:.0f} | {plain:.2f} | {compiled:.2f} | {gain:.0%} |")


if __name__ == "__main__":
    main()
