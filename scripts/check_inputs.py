"""What run_pipeline.sh sees to before its first stage: that all stages know the flags and take base and records.

    python scripts/check_inputs.py MODEL SFT_DATA RM_DATA RL_DATA QUIZ GENERAL [flags of the stages]

PT_DATA is not among them: the first stage reads it at once. What is read here is cached for the stages.
"""

import sys
from pathlib import Path

from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments.adapter import AdapterArguments  # noqa: E402
from arguments.command_line import UserError, known_flags, modern_flags, run_stage, unknown_words  # noqa: E402
from arguments.data import DataArguments  # noqa: E402
from arguments.guards import GuardArguments  # noqa: E402
from arguments.model import ModelArguments  # noqa: E402
from arguments.reward import RewardSourceArguments  # noqa: E402
from pretraining import PretrainingArguments  # noqa: E402
from reward_modeling import RewardArguments  # noqa: E402
from rl_training import PPOArguments  # noqa: E402
from scripts.quiz import load_quiz  # noqa: E402
from supervised_finetuning import FinetuningArguments  # noqa: E402

COMMON = ModelArguments, AdapterArguments, DataArguments
STAGES = {
    "pt": (*COMMON, PretrainingArguments),
    "sft": (*COMMON, FinetuningArguments),
    "rm": (*COMMON, RewardArguments),
    "rl": (*COMMON, RewardSourceArguments, GuardArguments, PPOArguments),
}


def of_flags(kind: type, *flags: str):
    """An argument group from those flags that it knows."""
    return HfArgumentParser(kind).parse_args_into_dataclasses(list(flags), return_remaining_strings=True)[0]


def check_flags(flags: list[str]) -> None:
    """Refuse a flag that not all stages know, a value that one refuses, and a word that belongs to no flag."""
    known = {stage: known_flags(*groups) for stage, groups in STAGES.items()}
    for flag in (word.partition("=")[0] for word in modern_flags(flags) if word.startswith("--")):
        those = [stage for stage in STAGES if flag in known[stage]]
        if not those:
            raise UserError(f"unknown argument {flag}: no stage knows it")
        if len(those) < len(STAGES):
            scripts = " and ".join(f"scripts/run_{stage}.sh" for stage in those)
            raise UserError(f"{flag} would be for all stages, and not all know it: write it into {scripts}")
    for groups in STAGES.values():
        if words := unknown_words(flags, *groups):
            raise UserError(f"{words[0]} belongs to no flag: leave it out")


def main():
    model, conversations, pairs, prompts, quiz, general, *flags = sys.argv[1:]
    check_flags(flags)
    of_flags(ModelArguments, *flags, "--model_name_or_path", model).check_scores()
    forms = {"conversation": conversations, "pair": pairs, "prompt": prompts, "document": general}
    for form, folder in forms.items():
        of_flags(DataArguments, *flags, "--train_file_dir", folder).check_records(form)
    load_quiz(quiz)


if __name__ == "__main__":
    run_stage(main)
