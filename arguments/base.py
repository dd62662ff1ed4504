"""Which base model an adapter was trained on: a fingerprint to keep beside the adapter, and its check."""

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from loguru import logger
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from arguments.atomic import read_json, write_atomically
from arguments.command_line import UserError, first_line
from arguments.shapes import only_shapes

BASE_FILE = "base.json"  # beside an adapter
WRAPPERS = ("rope_parameters", "rope_scaling", "text_config")  # where versions of transformers keep the same fields
IRRELEVANT = re.compile(  # to the logits of a model that does not train
    r"_token_id$|drop|^(output|return)_|use_cache|initializer|label|layer_types|tie_word|pretraining_tp|aux_loss|"
    r"^(quantization_config|generation_config|task_specific_params|auto_map)"
)
TENSORS, NUMBERS = 24, 8  # how many weight matrices are looked at, and how many numbers of each


def local_file(name_or_path: str, name: str) -> str | None:
    """Path of a file of a folder, or of a hub model that was loaded before; None where there is none."""
    try:
        return cached_file(name_or_path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    except OSError:  # neither a folder nor a hub model: loading it will say so
        return None


def weight_files(name_or_path: str) -> list[Path]:
    """The files that hold the weights of a folder or of a hub model that was loaded before; may be none."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if found := local_file(name_or_path, single):
            return [Path(found)]
        if found := local_file(name_or_path, index):
            shards, _ = get_checkpoint_shard_files(name_or_path, found, local_files_only=True)
            return sorted(map(Path, shards))
    return []


def open_safetensors(path: Path):
    """safetensors' safe_open; a damaged file is a UserError."""
    try:
        return safe_open(path, "pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): copy or download it again") from error


def stored_tensors(path: Path) -> Iterator[tuple[str, tuple, object]]:
    """Name, shape and a handle to slice of each tensor in a file, without reading the whole file."""
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                tensor = file.get_slice(name)
                yield name, tuple(tensor.get_shape()), tensor
    else:
        for name, tensor in pickled_tensors(path).items():
            yield name, tuple(tensor.shape), tensor


def pickled_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .bin file, memory-mapped unless a torch before 1.6 wrote it."""
    try:
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever it stumbles on
        raise UserError(
            f"{path} is damaged, or holds more than tensors ({first_line(error)}): copy or download it again, best as "
            "safetensors"
        ) from error


def numeric_fields(config: dict, prefix: str = "") -> dict[str, float]:
    """The numbers and switches of a config.json that affect the logits, by their path in it.

    Only fields that both configs have are compared: versions of transformers write more or fewer defaults.
    """
    found = {}
    for name, value in config.items():
        path = prefix if name in WRAPPERS else f"{prefix}{name}."
        if IRRELEVANT.search(name):
            continue
        if isinstance(value, dict):
            found |= numeric_fields(value, path)
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found


def fingerprint(name_or_path: str) -> dict:
    """What tells this base from another, read from its files in milliseconds; {} if they are not found.

    "model_type"; "config": the numbers in its config.json; "shapes": SHA-256 of all names and shapes; "weights":
    {name: [dtype, first numbers of its middle row]} of TENSORS matrices spread over the model, chosen by the hash of
    their names.
    """
    files, config = weight_files(name_or_path), local_file(name_or_path, CONFIG_NAME)
    if not files or not config:
        return {}
    config = json.loads(Path(config).read_text("utf-8"))
    shapes = {name: shape for path in files for name, shape, _ in stored_tensors(path)}
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    chosen = sorted(matrices, key=lambda name: hashlib.sha256(name.encode()).digest())[:TENSORS]
    weights = {}
    for path in files:
        for name, shape, tensor in stored_tensors(path):
            if name in chosen:
                numbers = tensor[shape[0] // 2 : shape[0] // 2 + 1, :NUMBERS]
                weights[name] = [str(numbers.dtype).removeprefix("torch."), numbers.flatten().tolist()]
    digest = hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()
    kind = {"model_type": config["model_type"], "config": numeric_fields(config)}
    return kind | {"shapes": digest, "weights": weights}


def same_numbers(first: list, second: list) -> bool:
    """Whether two [dtype, numbers] are the same weights, perhaps saved in two dtypes: then the coarser one decides."""
    if first[0] == second[0]:
        return first[1] == second[1]
    coarse = min(first[0], second[0], key=lambda dtype: torch.finfo(getattr(torch, dtype)).bits)
    one, other = (torch.tensor(numbers, dtype=torch.float64) for _, numbers in (first, second))
    return torch.equal(one.to(getattr(torch, coarse)), other.to(getattr(torch, coarse)))


def difference(known: dict, found: dict) -> str | None:
    """How the base of fingerprint `found` differs from that of `known`, in words; None if it is the same."""
    if not known or not found:
        return None
    if known["model_type"] != found["model_type"]:
        return f"it is a {found['model_type']}, the training was on a {known['model_type']}"
    if known["shapes"] != found["shapes"]:
        return "its tensors have other names or shapes than those of the model that was trained on"
    then, now = known.get("config", {}), found.get("config", {})  # a base.json of an older version has none
    both = sorted(then.keys() & now.keys())
    if fields := [n for n in both if not math.isclose(then[n], now[n], rel_tol=1e-6)]:  # 1e-5 may come as a float32
        return "its config.json differs: " + ", ".join(f"{n} is {now[n]}, was {then[n]}" for n in fields)
    changed = [n for n in known["weights"] if not same_numbers(known["weights"][n], found["weights"][n])]
    if changed:
        return f"{len(changed)} of {len(known['weights'])} weights looked at are not those that were trained on"
    return None


def facts_of(base: str) -> dict:
    """What base.json holds: the base's name and fingerprint."""
    return {"base": base, "fingerprint": fingerprint(base)}


def record_base(folder: Path, facts: dict | None) -> None:
    """Write `facts_of` a base into `folder`, if a training has begun on one."""
    if facts:
        write_atomically(folder / BASE_FILE, json.dumps(facts, indent=1))


def other_base(folder: Path, model: str) -> str | None:
    """How `model` differs from the base of `folder` (an adapter or a checkpoint), in words; None if it does not."""
    found = fingerprint(model)
    return difference(known_base(folder, found, model).get("fingerprint", {}), found)


def recorded_base(folder: Path) -> dict:
    """What `record_base` wrote into `folder`; {} if there is none.

    Raises:
        UserError: when it is damaged.
    """
    path = folder / BASE_FILE
    known = read_json(path)
    if path.exists() and not (isinstance(known, dict) and {"base", "fingerprint"} <= known.keys()):
        raise UserError(f"{path} is damaged: copy it again, or delete it to go without its check of the base")
    return known or {}


def known_base(folder: Path, found: dict, model: str) -> dict:
    """What base.json in `folder` says, {} if there is none; warns if `found` cannot be compared with it."""
    known = recorded_base(folder)
    if known and not (known["fingerprint"] and found):
        logger.warning(
            f"Whether {model} is the base of {folder} cannot be told: the files of one were not in a folder or in the "
            "hub's usual cache when they were looked for"
        )
    return known


def adapter_folder(path: str) -> Path | None:
    """Where adapter_config.json lies: in `path`, in its adapter/ after a merge in place, or nowhere (None)."""
    folders = Path(path), Path(path) / "adapter"
    return next((folder for folder in folders if (folder / "adapter_config.json").is_file()), None)


def tokenizer_folder(adapter: Path) -> Path | None:
    """Where an adapter's tokenizer lies: beside it or, after a merge in place, in the folder above; else None."""
    folders = (adapter, adapter.absolute().parent) if adapter.absolute().name == "adapter" else (adapter,)
    return next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), None)


def adapter_config(folder: Path) -> PeftConfig:
    """The adapter_config.json of a folder.

    Raises:
        UserError: when it is damaged, or not an adapter's.
    """
    try:
        return PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}/adapter_config.json cannot be read: {error}") from error


def is_base(adapter: Path, model: str) -> bool:
    """Whether the adapter was trained on `model`: by its name, or on the same weights under another name."""
    name = adapter_config(adapter).base_model_name_or_path
    if name == model or Path(name).resolve() == Path(model).resolve():
        return True
    with torch.device("cpu"):  # not the one without storage, on which --plan builds a model
        known, found = recorded_base(adapter).get("fingerprint"), fingerprint(model)
        return bool(known and found) and difference(known, found) is None


def check_base(adapter: Path, base: str, force: bool = False) -> None:
    """Check that `base` is what the adapter was trained on, as far as its base.json tells; --plan takes it as such.

    Raises:
        UserError: when it is not; with `force` that is a warning.
    """
    if only_shapes():
        return
    found = fingerprint(base)
    known = known_base(adapter, found, base)
    fault = difference(known.get("fingerprint", {}), found)
    if fault and not force:
        raise UserError(
            f"{base} is not the base of {adapter}: {fault}. Name {known['base']} as it was then, or --force"
        )
    if fault:
        logger.warning(f"--force: taking {base} as the base of {adapter}, though {fault}")
