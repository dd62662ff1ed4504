"""What run_pipeline.sh sees to before its first stage: that a later one, hours away, will not refuse base or records.

    python scripts/check_inputs.py MODEL SFT_DATA RM_DATA RL_DATA QUIZ GENERAL [flags of the stages]

PT_DATA is not among them: the first stage reads it at once. What is read here is cached for the stages.
"""

import sys
from pathlib import Path

from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments.command_line import run_stage  # noqa: E402
from arguments.data import DataArguments  # noqa: E402
from arguments.model import ModelArguments  # noqa: E402
from scripts.quiz import load_quiz  # noqa: E402


def of_flags(kind: type, *flags: str):
    """An argument group from those flags that it knows."""
    return HfArgumentParser(kind).parse_args_into_dataclasses(list(flags), return_remaining_strings=True)[0]


def main():
    model, conversations, pairs, prompts, quiz, general, *flags = sys.argv[1:]
    of_flags(ModelArguments, *flags, "--model_name_or_path", model).check_scores()
    forms = {"conversation": conversations, "pair": pairs, "prompt": prompts, "document": general}
    for form, folder in forms.items():
        of_flags(DataArguments, *flags, "--train_file_dir", folder).check_records(form)
    load_quiz(quiz)


if __name__ == "__main__":
    run_stage(main)
