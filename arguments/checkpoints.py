"""Checkpoints that are whole or absent: sealed last, older ones deleted only then, verified before a run resumes."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from loguru import logger
from transformers import TrainerCallback

from arguments.atomic import read_json, write_atomically
from arguments.base import record_base
from arguments.command_line import UserError, without_secrets

SEAL = "seal.json"  # in a checkpoint: which stage made it, size and hash of each of its files
# Flags that decide which tensors a checkpoint holds, and their defaults: with other ones it cannot be resumed.
SHAPING = {
    "use_peft": "true",
    "target_modules": "all",
    "modules_to_save": "none",
    "lora_rank": "8",
    "optim": "adamw_torch",
}
ADAPTERS = ("target_modules", "modules_to_save", "lora_rank")  # with --peft_path the adapter's own


class CheckpointSeal(TrainerCallback):
    """Writes the sizes and hashes of a checkpoint's files into it when all are there: unsealed, it is not whole.

    Only then are older checkpoints deleted, so that at any moment one is whole.
    """

    def on_save(self, args, state, control, **kwargs):
        if args.world_size > 1:
            torch.distributed.barrier()  # every rank saves its own random state
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / SEAL).unlink(missing_ok=True)
            record_base(folder, args.base_facts)  # if all weights are trained, nothing else names their base
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            seal = {"stage": type(args).__name__, **made_with(args), **facts(args)}
            seal["files"] = {str(p.relative_to(folder)): size_and_hash(p) for p in files}
            write_atomically(folder / SEAL, json.dumps(seal, indent=1))
            thin_out(folder, args.checkpoints_kept, state.best_model_checkpoint)


def made_with(args) -> dict:
    """The command of this run, and the checkpoint that it asks for; in a seal, which command saved it."""
    return {"arguments": without_secrets(sys.argv[1:]), "asked_for": args.resume_from_checkpoint}


def facts(args) -> dict:
    """What else of a run decides whether, and how, its checkpoints can be resumed."""
    sharding = "--fsdp" if args.fsdp else "an optimizer that is not sharded"
    if args.deepspeed:  # which divides the moments by processes
        stage = args.hf_deepspeed_config.get_value("zero_optimization.stage", 0)
        sharding = f"--deepspeed of ZeRO stage {stage} on {args.world_size} processes"
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {"weights_only": args.save_only_model, "sharding": sharding, "batch": batch}


def numbered(folder: Path) -> list[Path]:
    """The folders checkpoint-N, by number; not copies that somebody keeps beside them, as checkpoint-20-best."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    return sorted((path for path, name in found.items() if name), key=lambda path: int(found[path][1]))


def size_and_hash(path: Path) -> list:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def thin_out(newest: Path, kept: int | None, best: str | None) -> None:
    """Leave `kept` whole checkpoints with `newest`; also delete those that are older than it and not whole.

    As in transformers the best one stays and counts among the `kept`; None or 0 keeps all.
    """
    if not kept or kept < 0:
        return
    others = [found for found in numbered(newest.parent) if found != newest]
    whole = [folder for folder in others if checkpoint_fault(folder, hashes=False) is None]
    spare = [folder for folder in whole if best is None or folder.resolve() != Path(best).resolve()]
    room = max(kept - 1 - (len(whole) - len(spare)), 0)
    step = int(newest.name.rpartition("-")[2])
    broken = [f for f in others if f not in whole and int(f.name.rpartition("-")[2]) < step]
    for folder in broken + spare[: max(len(spare) - room, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def checkpoint_fault(folder: Path, hashes: bool = True) -> str | None:
    """Why the checkpoint cannot be trusted, or None when it is whole; without `hashes` only sizes are compared."""
    seal = read_json(folder / SEAL)  # a power cut may leave it empty
    if seal is None:
        return "its saving was interrupted"
    files = seal.get("files")
    if files is None:
        return "an older version saved it"

    def same(path: Path, size: int, sha256: str) -> bool:
        return path.is_file() and path.stat().st_size == size and (not hashes or size_and_hash(path)[1] == sha256)

    broken = [name for name, known in files.items() if not same(folder / name, *known)]
    return f"changed since it was saved: {', '.join(broken)}" if broken else None


def shape(flags: dict[str, str], name: str) -> str:
    """The value of one of SHAPING among a command's flags, alike for all spellings of it."""
    value = flags.get(name, SHAPING[name]).lower()
    if name == "use_peft":
        return str("no_use_peft" not in flags and value not in ("false", "no", "f", "n", "0")).lower()
    if name in ADAPTERS and ("peft_path" in flags or shape(flags, "use_peft") == "false"):
        return SHAPING[name]  # decides nothing then
    value = value.removesuffix("_fused")  # the state is the same
    return ",".join(sorted(value.replace(",", " ").split()))


def saved_by(args) -> str | None:
    """The newest whole checkpoint in output_dir that this very command saved before, if any."""
    seals = {path: read_json(path / SEAL) or {} for path in reversed(numbered(Path(args.output_dir)))}
    same = (path for path, seal in seals.items() if seal | made_with(args) == seal)
    return next((str(path) for path in same if checkpoint_fault(path) is None), None)


def drop_later(output: Path, found: Path) -> None:
    """If `found` lies in `output`, delete the checkpoints after it: a run that goes back leaves them behind."""
    folders = [folder.resolve() for folder in numbered(output)]
    later = folders[folders.index(found.resolve()) + 1 :] if found.resolve() in folders else []
    for folder in later:
        logger.warning(f"Removing {folder}: the run goes back to {found.name}")
        shutil.rmtree(folder, ignore_errors=True)


def check_contents(folder: Path, args) -> None:
    """Check that the checkpoint holds all that going on needs; warn if its steps took other numbers of records.

    Raises:
        UserError: if it holds weights alone, or its optimizer is sharded in another way.
    """
    now, seal = facts(args), json.loads((folder / SEAL).read_text())
    then = now | {"weights_only": False} | seal  # an older version recorded none of these
    if then["weights_only"]:
        raise UserError(
            f"{folder} holds weights alone (--save_only_model), and going on needs the optimizer too: start over "
            "(--fresh), or train on from these weights in another --output_dir, with --peft_path (all weights: "
            f"--model_name_or_path) {folder}"
        )
    if then["sharding"] != now["sharding"]:
        raise UserError(
            f"{folder} was trained with {then['sharding']}, and its tensors do not fit {now['sharding']}: give the "
            "same again, or start over (--fresh)"
        )
    if then["batch"] != now["batch"]:
        logger.warning(
            f"An optimizer step took {then['batch']} records, and now takes {now['batch']}: records of this epoch are "
            "skipped or repeated, and the schedule ends elsewhere. Batch size x processes x "
            f"--gradient_accumulation_steps = {then['batch']} keeps them"
        )


def check_changes(folder: Path) -> None:
    """Compare the flags with those that the checkpoint was made with: a warning names what differs.

    Raises:
        UserError: if one of SHAPING differs.
    """

    def flags(words: list[str]) -> dict[str, str]:  # if a flag is given twice, the last value counts
        parts = " ".join(words).removeprefix("--").split(" --")
        pairs = [part.replace("=", " ", 1).partition(" ")[::2] for part in parts]
        return {name.replace("-", "_"): value for name, value in pairs if name}

    before = json.loads((folder / SEAL).read_text()).get("arguments")
    if before is None:  # an older version saved it
        return
    before, now = flags(before), flags(without_secrets(sys.argv[1:]))
    for name in SHAPING:
        then, asked = shape(before, name), shape(now, name)
        if then != asked:
            raise UserError(
                f"{folder} was trained with --{name} {then}, and its tensors do not fit --{name} {asked}: give the "
                "same again, or start over (--fresh)"
            )
    changed = {name for name in before | now if before.get(name) != now.get(name)}
    names = sorted(changed - {"fresh", "overwrite_output_dir", "resume_from_checkpoint"})  # where to start, not how
    if names:
        changes = [f"--{name} {now.get(name, 'not given')} (was {before.get(name, 'not given')})" for name in names]
        logger.warning(
            f"The command has changed since: {', '.join(changes)}. The learning rate, and how far the "
            "schedule has come, stay the checkpoint's"
        )


def left_by_a_run(folder: Path) -> bool:
    """Whether a stage has trained into this folder, or its adapter was merged there."""
    return bool(numbered(folder)) or any((folder / name).exists() for name in ("run.json", "merge.json"))


def clear_output(folder: Path, sources: list[str]) -> None:
    """Remove what an earlier run left in `folder` and could be taken for this run's, except this run's `sources`."""
    names = ["merge.json", "run.json", *(f"{name}_results.json" for name in ("all", "train", "eval"))]
    names += [f"{name}.jsonl" for name in ("margins", "scores", "samples", "guards")]
    checkpoints, of_a_run = numbered(folder), left_by_a_run(folder)
    if (folder / "merge.json").exists():  # it was merged into itself
        names.append("adapter")
    if of_a_run and folder.resolve() not in [Path(source).resolve() for source in sources]:
        names += ["runs", "training_*.png"]
        names += ["adapter_config.json", "adapter_model.*", "value", "base.json"]
        names += ["model*.safetensors*", "config.json", "generation_config.json"]
    kept = {place for source in sources for place in (Path(source).resolve(), *Path(source).resolve().parents)}
    found = [*checkpoints, *(path for name in names for path in folder.glob(name))]
    removed = [path for path in found if path.resolve() not in kept]
    if removed:
        logger.info(f"Removing from {folder} (--fresh): {', '.join(path.name for path in removed)}")
    for path in removed:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
