"""The pipeline's closing table: every stage on held-out data, before and after; and three unseen prompts answered.

    python scripts/report.py outputs models/SmolLM2-135M-Instruct outputs/{pt,sft,rl}-merged

Reads   all_results.json of outputs/pt, sft, rm and rl, quiz.json and perplexity.json (of the scripts of these names),
        and the models: the base and those that PT, SFT and RL made.
Writes  answers.json and report.html (of scripts/page.py) into outputs.
"""

import json
import sys
from pathlib import Path

from loguru import logger

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments.atomic import read_json, read_lines  # noqa: E402
from arguments.command_line import UserError, run_stage  # noqa: E402
from inference import Answerer, InferenceArguments  # noqa: E402
from scripts.page import STAGES, write_page  # noqa: E402
from scripts.table import table_rows  # noqa: E402

PROMPTS = 3


def print_table(outputs: Path) -> None:
    print(f"\n{'':4} {'on held-out data':30} {'before':>9} {'after':>9}   n")
    for stage, what, before, after, count in table_rows({name: outputs / name for name in STAGES}, outputs):
        print(f"{stage:4} {what:30} {before:>9} {after:>9}   {count}")
    results = {name: json.loads((outputs / name / "all_results.json").read_text()) for name in STAGES}
    spent = [f"{n.upper()} {r['train_runtime']:.0f} s (peak {r['peak_rss_gib']:.1f} GiB)" for n, r in results.items()]
    print(f"\n     time per stage: {', '.join(spent)}")


def unseen_prompts(outputs: Path) -> list[list[dict]]:
    """The first held-out prompts that the RL stage showed, each time the same."""
    rows = read_lines(outputs / "rl" / "samples.jsonl")
    return [row["prompt"] for row in rows[:PROMPTS] if row.get("step") == rows[0].get("step")]


def main():
    logger.remove()  # lines of arguments would stand between those that are printed
    if len(sys.argv) != 6:
        raise UserError(f"expected a folder and four models: python {sys.argv[0]} OUTPUTS BASE PT SFT RL")
    outputs, base, pt, sft, rl = Path(sys.argv[1]), *sys.argv[2:]
    for name in STAGES:
        if read_json(outputs / name / "all_results.json") is None:
            raise UserError(
                f"{outputs / name} holds no whole all_results.json: name the folder of a pipeline that has ended"
            )
    print_table(outputs)
    prompts = unseen_prompts(outputs)
    answers = {}
    for name, path in (("base", base), ("PT", pt), ("SFT", sft), ("RL", rl)) if prompts else ():
        settings = InferenceArguments(path, tokenizer_path=sft, max_new_tokens=64)  # its template serves a bare base
        answers[name] = [text for text, _ in Answerer(path, settings).answer(prompts)]
    shown = [
        (messages[-1]["content"], {name: texts[number] for name, texts in answers.items()})
        for number, messages in enumerate(prompts)
    ]
    for question, given in shown:
        print(f"\n{question}")
        for name, text in given.items():
            print(f"  {name:5} {text}")
    (outputs / "answers.json").write_text(json.dumps(shown, ensure_ascii=False, indent=1), "utf-8")
    print(f"\nsee {write_page(outputs)}")


if __name__ == "__main__":
    run_stage(main)
