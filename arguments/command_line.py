"""The command line: today's flags and those of 2023, and one clear message for bad input."""

import dataclasses
import difflib
import logging
import os
import pickle
import re
import select
import signal
import sys
import time
import warnings
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path

import datasets
import huggingface_hub
import jinja2
import torch
from huggingface_hub.errors import HFValidationError
from loguru import logger
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import HfArgumentParser

from arguments.atomic import release

# Flags of the 2023 scripts and their names today. None: what the flag asked for happens by default.
RENAMED_FLAGS = {
    "--overwrite_output_dir": "--fresh",
    "--warmup_ratio": "--warmup_steps",  # a value below 1 is a share of all steps
    "--evaluation_strategy": "--eval_strategy",
    "--torch_dtype": "--dtype",
    "--gradient_checkpointing": "--activation_checkpointing",
    "--gradient_checkpointing_kwargs": "--activation_checkpointing_kwargs",
    "--no_cuda": "--use_cpu",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "--log_with": "--report_to",
    "--group_by_length": None,
    "--logging_dir": None,
    "--save_safetensors": None,
    "--fp16_opt_level": None,
}
LENGTHS = "give --max_source_length and --max_target_length, in PT --block_size"
TEMPLATE = "prompts use the tokenizer's own chat template, which --tokenizer_name_or_path may bring"
# Flags that later or other scripts know, whose names tell difflib nothing, and what to do here.
FLAGS_ELSEWHERE = {
    "--template_name": TEMPLATE,
    "--template": TEMPLATE,
    "--model_max_length": LENGTHS,
    "--max_seq_length": LENGTHS,
    "--cutoff_len": LENGTHS,
    "--qlora": "give --load_in_4bit",
    "--use_lora": "give --use_peft",
    "--finetuning_type": "give --use_peft",
    "--lora_target": "give --target_modules",
    "--flash_attn": "give --attn_implementation flash_attention_2, or leave it out",
    "--dataset": "give --train_file_dir, or --dataset_name",
    "--base_model": "give --model_name_or_path",
    "--lora_model": "give --peft_path",
    "--adapter_name_or_path": "give --peft_path",
    "--model_name": "give --model_name_or_path",
    "--model": "give --model_name_or_path",
    "--batch_size": "give --per_device_train_batch_size",
    "--epochs": "give --num_train_epochs",
    "--lr": "give --learning_rate",
}
DISK = re.compile(  # what errors of a full or unwritable disk say
    r"No space left|File too large|Read-only file system|Permission denied|Disk quota|PytorchStreamWriter|"
    r"unexpected pos \d",
    re.IGNORECASE,
)
PEER = re.compile(r"Connection (reset|closed) by peer", re.IGNORECASE)  # what gloo says when another rank has gone
SECRET = re.compile(r"--[\w-]*token", re.IGNORECASE)  # argparse knows each flag with _ and with -


class UserError(Exception):
    """Bad input. The message says what, where, what was expected and what to do; the process exits with code 2."""

    code = 2


class Fault(UserError):
    """The input was right and the run failed, as said in the message; the process exits with code 1."""

    code = 1


def given(args, flags: Collection[str]) -> list[str]:
    """Those of the flags whose value is not the default."""

    def plain(one):
        return one.default if one.default_factory is dataclasses.MISSING else one.default_factory()

    return [
        one.name for one in dataclasses.fields(args) if one.name in flags and getattr(args, one.name) != plain(one)
    ]


def expect(args, what: str, holds: Callable, *flags: str) -> None:
    """Refuse each flag whose value is not `what`, as `holds` says; None stands for no value, NaN holds nowhere."""
    for flag in flags:
        if (value := getattr(args, flag)) is not None and not holds(value):
            raise UserError(f"--{flag} is {value}, expected {what}")


def run_stage(main):
    """Call `main()`; bad input ends with one message on stderr and exit code 2, without a traceback.

    So do a disk that is full or cannot be written to, with exit code 1, and Ctrl-C outside training, with 130.
    """
    logger.remove()
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    rank, several = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1") != "1"
    line = "{time:HH:mm:ss} {level: <7} " + (f"rank {rank}: " if several else "") + "{message}"
    logger.add(beside_bars, format=line, level="INFO" if rank == "0" else "ERROR")
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)  # a note on the tokenizer's pad token
    if not sys.warnoptions:  # python -W default shows what libraries say about each other's calls
        warnings.simplefilter("ignore", FutureWarning)
    try:
        main()
        leave_group()
    except KeyboardInterrupt:  # while training, arguments.stops saves a checkpoint first
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            sys.exit(128 + signal.SIGPIPE)
        said = error if isinstance(error, UserError) else explained(error)
        if said is None:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            wait_for_first_rank()
        beside_bars(f"error: {said}\n")
        sys.exit(said.code)
    finally:
        release()


def wait_for_first_rank(seconds: float = 10) -> None:
    """Leave an error that all ranks meet to the machine's first one: torchrun ends the others once that has gone."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a trainer's handler would only note it
    time.sleep(seconds)


def reader_is_gone() -> bool:
    """Whether nobody reads our output any more, as behind `| head`; then nothing more is written there."""
    state = select.poll()
    state.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in state.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def leave_group() -> None:
    """Leave the process group of a run that has succeeded.

    A thread of gloo frees the last collective's tensors after the collective has returned. If Python is exiting by
    then, that aborts the process, and torchrun reports a failure: seen in 26 of 120 short FSDP2 runs (PyTorch 2.13),
    and in none of 60 with this pause, in which the thread gets the GIL. Destroying the group alone does not wait.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.1)
        torch.distributed.destroy_process_group()


def beside_bars(line: str) -> None:
    """Write a log line to stderr without breaking progress bars."""
    tqdm.write(line, file=sys.stderr, end="")


def explained(error: Exception) -> UserError | None:
    """A plain message for a library's error whose cause is a file, a disk or a flag; None for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "size mismatch for" in text:
        return UserError(
            f"what was saved does not fit the model that these flags describe ({text[:200]} ...): give the flags of "
            "the earlier run, or start over (--fresh)"
        )
    if isinstance(error, RuntimeError) and PEER.search(text):
        return Fault(
            "another process of this run ended first: its message says why; one that was killed (is there memory "
            "enough?) leaves none"
        )
    if isinstance(error, ImportError) and "install" in text:  # a flag wants a package, and its library says which
        return UserError(text)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"TransportError", "OfflineModeIsEnabled"}:  # of httpx, which the hub's library uses, and of its own
        return Fault(f"a server cannot be reached: {text}. Try again, or leave out what needs it (--push_to_hub)")
    if isinstance(error, jinja2.TemplateSyntaxError):
        return UserError(f"the tokenizer's chat template, line {error.lineno}: {error.message}")
    if isinstance(error, pickle.UnpicklingError) or "PytorchStreamReader" in text:
        return UserError(f"a file of weights is damaged, or holds more than tensors: {text[:200]}")
    gone = next((e for e in (error, error.__cause__) if isinstance(e, FileNotFoundError) and e.filename), None)
    if gone:  # what flags name was checked when they were read, so this one was there then
        return Fault(f"{gone.filename} is not there, or not any more: put it back, then run the same command")
    shut = next((e for e in (error, error.__cause__) if isinstance(e, PermissionError) and e.filename), None)
    if shut and os.path.exists(shut.filename) and not os.access(shut.filename, os.R_OK, effective_ids=True):
        return UserError(f"{shut.filename} cannot be read: this user lacks the permission. Grant it, or name another")
    # torch.save raises RuntimeError for a write that failed, tokenizers a bare Exception
    of_writing = isinstance(error, OSError | SafetensorError | RuntimeError) or type(error) is Exception
    if of_writing and DISK.search(text):
        return Fault(
            f"cannot write or read: {text}. Free some space, fix the permissions or name another --output_dir, then "
            "run the same command: training goes on from its last whole checkpoint, anything else starts over"
        )
    return None


def first_line(error: Exception) -> str:
    """The first line of what an error says; its type, if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: Exception) -> str:
    """The start of what an error says, without its line breaks."""
    return " ".join(str(error).split())[:300]


def not_found(name: str, error: Exception) -> str:
    """Why a model or tokenizer could not be loaded; transformers takes what is not a folder for a name on the hub."""
    if Path(name).exists():
        return first_line(error)
    if isinstance(error.__cause__, HFValidationError):
        return "no such folder, and no name of a model on the hub"
    made = " (has its stage run, to the end of its merge?)" if name.endswith("-merged") else ""
    return f"no such folder{made}, and as a name on the hub: {first_line(error)}"


def without_secrets(argv: list[str]) -> list[str]:
    """A command line's words, with the values of --hub_token and all other flags that end in token masked."""
    words = []
    for word in argv:
        name, equals, _ = word.partition("=")
        if equals and SECRET.fullmatch(name):
            words.append(f"{name}=...")
        else:
            words.append("..." if words and SECRET.fullmatch(words[-1]) else word)
    return words


def modern_flags(argv: list[str]) -> list[str]:
    """Translate the flags that transformers 5 dropped, with one warning line each."""
    translated, skipping = [], False
    for word, following in pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        if name == "--warmup_ratio" and re.fullmatch(r"[1-9]\d*(\.\d*)?", value or following):
            raise UserError(f"{name} is {value or following}, expected a share of the steps, below 1")
        if name == "--group_by_length" and (value or following).lower() in ("false", "f", "no", "n", "0"):
            logger.warning(f"{name} {value or following} is today --train_sampling_strategy random")
            translated += ["--train_sampling_strategy", "random"]
            skipping = True
        elif name in RENAMED_FLAGS:
            modern = RENAMED_FLAGS[name]
            logger.warning(f"{name} is the old name of {modern}" if modern else f"{name} has no effect any more")
            skipping = modern is None
            if modern:
                translated.append(modern + equals + value)
        elif not (skipping and not word.startswith("--")):
            skipping = False
            translated.append(word)
    return translated


class _Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults of flags, unless None, and a script's docstring as it stands."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Of argument groups, of which later ones may give a flag of earlier ones another default."""

    def __init__(self, groups: tuple[type, ...], **kwargs):
        usage = {"usage": "%(prog)s [flags]", "formatter_class": _Help}
        super().__init__(groups, allow_abbrev=False, conflict_handler="resolve", **usage, **kwargs)
        unused = {flag: why for group in groups for flag, why in getattr(group, "unused", {}).items()}
        for action in self._actions:
            if action.dest in unused:
                action.help = f"No effect: {unused[action.dest]}."
            elif action.option_strings[0].startswith("--no_"):  # HfArgumentParser's --no_flag for --flag False
                action.help = SUPPRESS

    def error(self, message: str):
        raise UserError(f"{message} (see python {self.prog} --help)")


def known_flags(*groups: type) -> set[str]:
    """The flags of argument groups, each with _ and with -."""
    return {option for action in _Parser(groups)._actions for option in action.option_strings}


def unknown_words(argv: list[str], *groups: type) -> list[str]:
    """What a stage's argument groups do not know of a command line."""
    return _Parser(groups, prog=f"{groups[-1].__module__}.py").parse_known_args(modern_flags(argv))[1]


def parse_arguments(*groups: type, argv: list[str] | None = None) -> list:
    """Return one instance per argument group.

    Raises:
        UserError: for an unknown flag (naming the nearest known one), or a value a group refuses.
    """
    parser = _Parser(groups, description=sys.modules["__main__"].__doc__)
    namespace, unknown = parser.parse_known_args(modern_flags(sys.argv[1:] if argv is None else argv))
    if unknown:
        flags = known_flags(*groups) | set(RENAMED_FLAGS)
        flag = unknown[0].partition("=")[0].replace("-", "_").replace("__", "--", 1)
        near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"python {parser.prog} --help lists the flags"
        advice = FLAGS_ELSEWHERE.get(flag, "")
        if flags & set(re.findall(r"--\w+", advice)):  # not those of another script
            hint = advice
        raise UserError(f"unknown argument {unknown[0]}: {hint}")
    try:
        return [
            group(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(group) if f.init})
            for group in groups
        ]
    except (ValueError, ImportError) as error:  # transformers and trl check their flags in __post_init__
        raise UserError(" ".join(str(error).split())) from error
