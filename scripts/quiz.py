"""Accuracy on a multiple-choice quiz, by the likelihood of the options: what a model knows, without asking it to chat.

    python scripts/quiz.py data/quiz models/SmolLM2-135M-Instruct outputs/pt-merged outputs/sft-merged

Reads a folder of {"question", "options", "answer": index} records and the models; prints one JSON object
{model: {"accuracy", "chance", "questions", "language": {"en": accuracy, ...}}}, where chance is the accuracy of
guessing. A model's answer is the option with the highest log-probability per UTF-8 byte, as in
lm-evaluation-harness's acc_bytes.
"""

import json
import sys
from itertools import takewhile
from pathlib import Path
from statistics import fmean

import torch
from loguru import logger
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments.command_line import UserError, run_stage  # noqa: E402
from arguments.files import BadRecord, read_file  # noqa: E402
from scripts.perplexity import folder_and_models, load_judged  # noqa: E402

# by the name of the file; other languages are asked in English words
PROMPTS = {"en": "Question: {}\nAnswer: ", "zh": "问题：{}\n答案："}


@torch.no_grad()
def choice(model, tokenizer, prompt: str, options: list[str]) -> int:
    """Index of the option that the model finds most likely after the prompt, which it reads once."""
    rows = [tokenizer(prompt + option)["input_ids"] for option in options]
    shared = shared_prefix([tokenizer(prompt)["input_ids"], *(row[:-1] for row in rows)])
    # all shared tokens but the last, whose logits say how likely an option's first token is
    read = torch.tensor([rows[0][: shared - 1]], device=model.device)
    cache = getattr(model(read, use_cache=True, logits_to_keep=1), "past_key_values", None)
    cached = shared - 1 if cache is not None else 0  # Mamba has no such cache: it reads the prompt with each option
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    rest = [torch.tensor(row[cached:]) for row in rows]
    ids = pad_sequence(rest, batch_first=True).to(model.device)  # nothing reads the padding
    logp = model(ids[:, :-1], **({} if cache is None else {"past_key_values": cache})).logits.float().log_softmax(-1)
    logp = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
    totals = [row[shared - 1 - cached : len(tokens) - 1].sum() for row, tokens in zip(logp, rest, strict=True)]
    return int(torch.tensor([t / len(o.encode()) for t, o in zip(totals, options, strict=True)]).argmax())


def shared_prefix(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with: a prompt's last token may be another one where an option follows it."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))


def accuracy(path: str, quiz: dict[str, list[dict]]) -> dict:
    """A model's share of right answers, over all questions and by language."""
    model, tokenizer = load_judged(path)
    right = {
        language: [
            choice(model, tokenizer, PROMPTS.get(language, PROMPTS["en"]).format(row["question"]), row["options"])
            == row["answer"]
            for row in tqdm(rows, f"Quiz ({language}) for {path}")
        ]
        for language, rows in quiz.items()
    }
    everything = sum(right.values(), [])
    by_language = {language: fmean(found) for language, found in right.items()}
    chance = fmean(1 / len(row["options"]) for rows in quiz.values() for row in rows)
    counted = {"accuracy": fmean(everything), "chance": chance, "questions": len(everything)}
    return counted | {"language": by_language}


def load_questions(path: Path) -> list[dict]:
    """The questions of a file.

    Raises:
        UserError: when a line is none, or the file holds none.
    """
    rows = []
    for place, row in read_file(path):
        if isinstance(row, BadRecord):
            raise UserError(f"{place}: {row}")
        if not is_question(row):
            raise UserError(
                f'{place}: expected {{"question": text, "options": [two texts or more], "answer": the index of the '
                f"right one, from 0}}, found {str(row)[:100]}"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no questions: fill it, or take it away")
    return rows


def load_quiz(folder: str) -> dict[str, list[dict]]:
    """The questions of each .jsonl file in a folder, by its name."""
    quiz = {path.stem: load_questions(path) for path in sorted(Path(folder).glob("*.jsonl"))}
    others = [path for path in sorted(Path(folder).glob("[!.]*")) if path.suffix != ".jsonl"]
    if quiz and others:
        print(f"not read, only .jsonl files are: {', '.join(map(str, others))}", file=sys.stderr)
    if not quiz:
        raise UserError(f"{folder} holds no .jsonl file of questions: name a folder like data/quiz")
    return quiz


def is_question(row) -> bool:
    if not (isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("options"), list)):
        return False
    options, answer = row["options"], row.get("answer")
    texts = len(options) > 1 and all(isinstance(option, str) and option for option in options)
    return texts and type(answer) is int and 0 <= answer < len(options)


def main():
    logger.remove()  # lines of arguments would stand between the bars
    folder, models = folder_and_models()
    quiz = load_quiz(folder)
    print(json.dumps({path: accuracy(path, quiz) for path in models}, indent=1))


if __name__ == "__main__":
    run_stage(main)
