"""Checks of transformers' flags: without effect, best-checkpoint metric, accelerator settings, optimizer."""

import copy
import json
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from loguru import logger
from transformers import Trainer
from transformers.trainer_pt_utils import AcceleratorConfig

from arguments.command_line import UserError, given

WITHOUT_EFFECT = {  # in every stage: why, or what to use
    "length_column_name": "the stages themselves make the column of lengths",
    "do_predict": "inference.py answers questions",
    "include_for_metrics": "the stages have metrics of their own",
    "batch_eval_metrics": "the stages have metrics of their own",
}
# Flags that are JSON objects, with an example; transformers names none of them when one is not.
OBJECTS = {"activation_checkpointing_kwargs": '{"every_n_layers": 2}', "lr_scheduler_kwargs": '{"num_cycles": 2}'}
CHECKPOINTING = "every_n_layers", "offload", "use_reentrant", "preserve_rng_state"
CHECKPOINTING += "determinism_check", "debug", "early_stop"
NEEDS = {  # what a flag has no effect without, or ends in a traceback
    "dataloader_persistent_workers": "dataloader_num_workers",
    "dataloader_multiprocessing_context": "dataloader_num_workers",
}


def check_dead_flags(args) -> None:
    """Warn of flags without effect; refuse those without the other flag that `args.needs` names for them."""
    for flag in given(args, args.needs):
        if not getattr(args, args.needs[flag]):
            raise UserError(f"--{flag} has no effect without --{args.needs[flag]}: give both, or neither")
    for flag in given(args, WITHOUT_EFFECT):
        logger.warning(f"--{flag} has no effect: {WITHOUT_EFFECT[flag]}")


def check_metric(args) -> None:
    """Refuse a metric that no evaluation has; without --greater_is_better, take the direction of `args.metrics`.

    transformers takes more for better unless the name ends in loss, and notices an unknown name only when it first
    evaluates.
    """
    if (asked := args.metric_for_best_model) is None or not args.metrics:
        return
    found = [more for name, more in args.metrics.items() if fnmatchcase(asked.removeprefix("eval_"), name)]
    if not found:
        names = ", ".join(f"eval_{name}" for name in args.metrics)
        raise UserError(
            f"--metric_for_best_model {asked} cannot tell the best checkpoint of this stage: expected one of {names}"
        )
    if args.greater_is_better is None:
        args.greater_is_better = found[0]


def json_of(args, flag: str, hint: str) -> dict:
    """The object that a flag's value is, in JSON, or that the file holds which it names."""
    asked = str(getattr(args, flag))
    if not asked.startswith("{") and not Path(asked).is_file():
        raise UserError(f"--{flag} {asked} is not a file: {hint}")
    try:
        found = json.loads(asked if asked.startswith("{") else Path(asked).read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"--{flag} {asked} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"--{flag} {asked} is not a JSON object: {hint}")
    return found


def check_objects(args) -> None:
    """Read the flags that are JSON objects; refuse what activation checkpointing would not know."""
    for flag, example in OBJECTS.items():
        if isinstance(getattr(args, flag), str):
            setattr(args, flag, json_of(args, flag, f"expected JSON such as {example}"))
    if args.activation_checkpointing_kwargs and not args.activation_checkpointing:
        logger.warning("--activation_checkpointing_kwargs has no effect without --activation_checkpointing")
    if unknown := sorted((args.activation_checkpointing_kwargs or {}).keys() - set(CHECKPOINTING)):
        names = ", ".join(CHECKPOINTING)
        raise UserError(f"--activation_checkpointing_kwargs: {unknown[0]} is unknown, expected {names}")


def check_accelerator_config(args) -> None:
    if not isinstance(args.accelerator_config, str):
        return
    known = {one.name for one in fields(AcceleratorConfig)}
    settings = json_of(args, "accelerator_config", 'expected one, or JSON such as {"even_batches": true}')
    if unknown := sorted(set(settings) - known):
        raise UserError(f"--accelerator_config: {unknown[0]} is unknown, expected {', '.join(sorted(known))}")
    if settings.get("split_batches") or settings.get("dispatch_batches"):  # own_rows goes by the usual shares of ranks
        raise UserError(
            "--accelerator_config: split_batches and dispatch_batches are not supported here: leave them out"
        )
    if "num_steps" in (settings.get("gradient_accumulation_kwargs") or {}):
        raise UserError("--accelerator_config: instead of num_steps give --gradient_accumulation_steps")


def check_optimizer(args) -> None:
    """Refuse what transformers would find missing when training starts; warn of settings that it does not read."""
    layer = torch.nn.Linear(1, 1)

    def made(**changes):
        """The optimizer and its settings, or the error instead, with some flags changed."""
        changed = copy.copy(args)
        vars(changed).update(changes)
        try:
            return Trainer.get_optimizer_cls_and_kwargs(changed, layer)
        except (ImportError, TypeError, ValueError) as error:
            return error

    found = made()
    if isinstance(found, Exception) and "No target modules found" not in str(found):  # they are in the real model
        raise UserError(f"--optim {args.optim.value}: {found}") from found
    for flag in given(args, ("optim_args", "optim_target_modules")):
        if made(**{flag: None}) == found:
            logger.warning(f"--{flag} has no effect: --optim {args.optim.value} takes nothing of it")
