"""--plan: what a run would take, before anything is loaded: memory by role, disk, tokens, steps; and does it fit?"""

import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from datasets import Dataset

from arguments.rehearsal import NF4_BITS, Load, Rehearsal, rehearse_pairs, rehearse_tokens
from arguments.rehearsal_ppo import rehearse_ppo
from arguments.rows import token_lengths

GIB = 2**30
PROCESS = "process"
ROLES = {  # in the order of the table
    PROCESS: "this process before loading",
    "weights": "weights",
    "mapped": "weights file, still mapped",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "KV cache": "KV cache",
    "logits": "logits",
}
SAVERS = (  # tried one after another if it does not fit; the first is the stage's own flag for rows at once
    ("{} 1", {"rows": 1}),
    ("--activation_checkpointing", {"checkpointing": True}),
    ("--load_in_4bit", {"bits": NF4_BITS}),
    ("half the length limits", {"share": 0.5}),
)


def plan_tokens(model_args, adapter_args, args, train: Dataset, held_out: Dataset, collate: Callable) -> None:
    """Print the plan of stage 1 or 2, where `collate` makes batches of rows."""
    rehearse = partial(rehearse_tokens, model_args, adapter_args, args, train, held_out, collate)
    show(model_args, adapter_args, args, train, rehearse)


def plan_pairs(model_args, adapter_args, args, train: Dataset, held_out: Dataset, tokenizer, longest: int) -> None:
    """Print the plan of stage 3, with answers and their prompts of up to `longest` tokens."""
    rehearse = partial(rehearse_pairs, model_args, adapter_args, args, train, held_out, tokenizer, longest)
    show(model_args, adapter_args, args, train, rehearse)


def plan_ppo(model_args, adapter_args, args, train: Dataset, held_out: Dataset, data_args, reward_args) -> None:
    """Print the plan of stage 4, with answers as long as they may be."""
    rehearse = partial(rehearse_ppo, model_args, adapter_args, args, train, held_out, data_args, reward_args)
    show(model_args, adapter_args, args, train, rehearse, "micro_batch_size")


def show(model_args, adapter_args, args, train, rehearse, rows_flag: str = "per_device_train_batch_size") -> None:
    """Rehearse the run and print what it takes, from what this process holds now."""
    held, limit = in_use(args.device), total_memory(args.device)
    bits = NF4_BITS if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 0
    load = Load(getattr(args, rows_flag), checkpointing=bool(args.activation_checkpointing), bits=bits)
    found = rehearse(load)
    if not args.should_log:
        return
    print(f"Plan of {Path(sys.argv[0]).name}, from shapes: no weight was read")
    if args.deepspeed or args.fsdp:
        print("of a process that shards nothing: what --deepspeed and --fsdp split or copy is not counted")
    for name, value in (parameters(found), amounts(train, args), disk(found, adapter_args, args)):
        print(f"{name:<30}{value}")
    print(table(found.phases, held))
    print(verdict(peak(found, held), limit, args.device))
    if peak(found, held) > limit:
        print("\n".join(advice(load, rows_flag, rehearse, held, limit, adapter_args.use_peft)))


def verdict(highest: int, limit: int, device: torch.device) -> str:
    fits = "it fits" if highest <= limit else "it does not fit"
    return f"peak {highest / GIB:.2f} GiB of the {limit / GIB:.1f} GiB of this {device.type}: {fits}"


def in_use(device: torch.device) -> int:
    """Bytes that this process holds before it loads a model; on a GPU, all that is in use there."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return psutil.Process().memory_info().rss


def total_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total


def peak(found: Rehearsal, held: int) -> int:
    return held + max(phase.total() for phase in found.phases.values())


def parameters(found: Rehearsal) -> tuple[str, str]:
    total = sum(parameter.numel() for parameter in found.model.parameters())
    trained = sum(parameter.numel() for parameter in found.trained)
    return "parameters", f"{total:,}, trained {trained:,} ({trained / total:.2%})"


def amounts(train, args) -> tuple[str, str]:
    """Rows and tokens of an epoch, and optimizer steps of the run."""
    if not isinstance(train, Dataset):
        return "rows, tokens, steps", f"streamed; {args.max_steps:,} optimizer steps"
    count = token_lengths(train)["total"]
    batches = math.ceil(len(train) / (args.per_device_train_batch_size * args.world_size))
    steps = math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
    steps = args.max_steps if args.max_steps > 0 else steps
    return "rows, tokens, steps", f"{len(train):,} rows, {count:,} tokens an epoch, {steps:,} optimizer steps"


def disk(found: Rehearsal, adapter_args, args) -> tuple[str, str]:
    """Checkpoints (trained weights and their optimizer), the merged model, and what is free where they go."""
    trained = sum(parameter.nbytes for parameter in found.trained)
    held = next(iter(found.phases.values()))
    kept, each = args.checkpoints_kept, found.copies * trained + held["optimizer"]
    output = Path(args.output_dir).absolute()
    folder = next(path for path in (output, *output.parents) if path.exists())
    text = f"{each / GIB:.2f} GiB a checkpoint ({kept or 'all'} kept)"
    if adapter_args.use_peft:
        text += f", {merged_bytes(found) / GIB:.2f} GiB the merged model"
    return "disk", f"{text}; {shutil.disk_usage(folder).free / GIB:.1f} GiB free"


def merged_bytes(found: Rehearsal) -> int:
    """Bytes of the merged model: the base's weights in the dtype that its config names."""
    dtype = found.model_args.load_config().dtype or torch.float32
    return dtype.itemsize * sum(p.numel() for name, p in found.model.named_parameters() if "lora_" not in name)


def table(phases: dict[str, Counter], held: int) -> str:
    """Memory in GiB at the peak of each phase, a line for each role that takes any."""
    phases = {name: phase | Counter({PROCESS: held}) for name, phase in phases.items()}
    lines = [f"{'memory, GiB':<30}" + "".join(f"{name:>10}" for name in phases)]
    for role, label in ROLES.items():
        if any(phase[role] for phase in phases.values()):
            lines.append(f"  {label:<28}" + "".join(f"{phase[role] / GIB:>10.2f}" for phase in phases.values()))
    return "\n".join([*lines, f"  {'in all':<28}" + "".join(f"{p.total() / GIB:>10.2f}" for p in phases.values())])


def advice(load: Load, rows_flag: str, rehearse, held: int, limit: int, lora: bool) -> list[str]:
    """What to change, one thing after another until it fits, with the peak that each leaves."""
    lines, flags = ["What to change, one after another:"], []
    for text, change in SAVERS:
        if replace(load, **change) == load or ("bits" in change and (load.bits or not lora)):
            continue
        load = replace(load, **change)
        flags.append(text.format(f"--{rows_flag}"))
        highest = peak(rehearse(load), held)
        lines.append(f"  {' '.join(flags)}: {highest / GIB:.2f} GiB")
        if highest <= limit:
            return [*lines, "  which fits"]
    return [*lines, "  which still does not fit: a smaller model, or a larger machine"]
