r"""Between stages: merge a LoRA adapter into its base model, and prove the result before keeping it.

    python merge_peft_adapter.py --base_model_name_or_path models/SmolLM2-135M-Instruct --peft_model_path outputs/pt \
        --output_dir outputs/pt-merged

Reads   the base model and an adapter of a causal language model or of a reward model (its score head comes along).
        Weights stay on disk: a merge holds about one file of the base in memory.
Writes  a plain model with tokenizer and chat template, that from_pretrained loads, and merge.json with the proof:
        each merged tensor against the formula of its adapter, the logits of a few texts against the adapter model's.
        output_dir may be the adapter's own folder: the adapter then moves into its subfolder adapter/, since
        transformers would add an adapter beside merged weights a second time.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors in huge pages, read at PyTorch's import: a third faster

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from loguru import logger
from peft import PeftConfig, PeftType
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
)

from arguments.adapter import with_saved_adapter
from arguments.atomic import hold_folder
from arguments.base import (
    adapter_config,
    adapter_folder,
    check_base,
    fingerprint,
    is_base,
    recorded_base,
    tokenizer_folder,
    weight_files,
)
from arguments.checkpoints import size_and_hash
from arguments.command_line import Fault, UserError, explained, first_line, one_line, parse_arguments, run_stage
from arguments.model import ModelArguments
from arguments.reward import pad_alike
from arguments.streamed import MergedWeights, adapted, grown_vocabulary, opened, running, save_merged, untie

PROBES = (
    "What are the symptoms of influenza, and when should I see a doctor?",
    "高血压患者平时要注意什么？",
    "The treatment of asthma rests on inhaled medicines that",
)
# Root mean square of the differences of logits, relative to their own spread, that rounding to a dtype explains. The
# largest of many thousands is larger: up to 0.2 in bfloat16, for random OLMo 2 and gpt-oss of 16 layers.
TOLERANCE = {"float32": 3e-4, "float16": 1e-2, "bfloat16": 1e-1}


@dataclass
class MergeArguments:
    """What is merged into what."""

    base_model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--base_model", "--base-model"], "help": "Default: what the adapter names."},
    )
    peft_model_path: str = field(
        default="", metadata={"aliases": ["--lora_model", "--lora-model"], "help": "Folder of the adapter. Required."}
    )
    output_dir: str = field(default="", metadata={"help": "Where the merged model goes. Required."})
    model_type: str | None = field(default=None, metadata={"help": "Accepted from older scripts; the config decides."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the written weights: auto is the base's own. Merging itself runs in float32.",
            "choices": ["auto", "float32", "float16", "bfloat16"],
        },
    )
    max_shard_size: str | None = field(
        default=None,
        metadata={"help": "Largest file to write, e.g. 5GB. Default: that of the base; memory follows it."},
    )
    gguf: str | None = field(
        default=None,
        metadata={"help": "Folder of a llama.cpp checkout: its convert_hf_to_gguf.py also writes model.gguf."},
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Upload the merged model under this name."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    force: bool = field(default=False, metadata={"help": "Merge into another base than the adapter was trained on."})

    def __post_init__(self):
        for flag in ("peft_model_path", "output_dir"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is missing")
        if Path(self.output_dir).is_file():
            raise UserError(f"--output_dir {self.output_dir} is a file: name a folder")
        if self.gguf and not (Path(self.gguf) / "convert_hf_to_gguf.py").is_file():
            raise UserError(f"--gguf {self.gguf} holds no convert_hf_to_gguf.py: name a checkout of llama.cpp")
        if self.max_shard_size and not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]I?B", self.max_shard_size.upper()):
            raise UserError(f"--max_shard_size is {self.max_shard_size}, expected a size such as 5GB or 500MB")


def give_memory_back() -> None:
    """Let glibc return each freed tensor to the system: kept ones, as env.sh asks for, pile up layer by layer."""
    threshold, most = (-3, 2**20), (-4, 2**16)  # M_MMAP_THRESHOLD, M_MMAP_MAX of mallopt(3)
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(*threshold)
        set_option(*most)


def check(args: MergeArguments, config: PeftConfig, adapter: Path) -> None:
    """Refuse what cannot succeed, before anything is loaded or written."""
    base = args.base_model_name_or_path
    if not base:
        raise UserError(f"{adapter} does not say which base it was trained on: name it with --base_model_name_or_path")
    output = Path(args.output_dir).resolve()
    if output == Path(base).resolve():
        raise UserError(f"--output_dir {args.output_dir} is the base model's own folder: name another")
    if (output / "adapter_config.json").exists() and output != adapter.resolve():
        raise UserError(
            f"--output_dir {args.output_dir} holds another adapter, which is not merged: name another folder"
        )
    if config.init_lora_weights == "olora":  # PiSSA and its like are found when they are loaded
        raise UserError(f"{adapter}: its kind of initialisation (OLoRA) changes the base: save it as plain LoRA")
    if config.layer_replication:
        raise UserError(f"{adapter} repeats layers of its base (layer_replication), which is not merged here")
    if args.gguf and config.task_type == "SEQ_CLS":
        raise UserError(f"{adapter} is of a reward model, for which GGUF has no head: leave --gguf out")
    found = ModelArguments(model_name_or_path=base, trust_remote_code=args.trust_remote_code).load_config()
    if getattr(found, "quantization_config", None):
        raise UserError(f"{base} is quantised and cannot hold what a merge makes of it: name what it was made from")


def check_hub(name: str) -> None:
    """See that the hub can be reached, and knows this user, before hours of work are to go there."""
    try:
        validate_repo_id(name)
        HfApi().whoami()
    except (HFValidationError, HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise UserError(
            f"--push_to_hub {name}: {first_line(error)} (expected a name like user/model, and a user who is logged in "
            "with hf auth login)"
        ) from error


def load_tokenizer(args: MergeArguments, adapter: Path):
    """The adapter's tokenizer, else the base's."""
    source = tokenizer_folder(adapter) or args.base_model_name_or_path
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {source}: {first_line(error)}") from error


def auto_class(config: PeftConfig):
    return AutoModelForSequenceClassification if config.task_type == "SEQ_CLS" else AutoModelForCausalLM


def settings(args: MergeArguments, config: PeftConfig) -> dict:
    """What from_pretrained is told of a base, for the head that the adapter's task needs.

    Servers read the problem type: without one vLLM puts a reward model's score into a sigmoid.
    """
    labels = {"num_labels": 1, "problem_type": "regression"} if config.task_type == "SEQ_CLS" else {}
    return labels | {"trust_remote_code": args.trust_remote_code}


def load(args: MergeArguments, config: PeftConfig, folder: Path, dtype: torch.dtype, **kwargs):
    """The base, empty; and the index of where its tensors lie."""
    name = args.base_model_name_or_path
    try:
        return opened(auto_class(config), name, folder, dtype, **settings(args, config), **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        if explained(error):  # the disk is at fault, not the model
            raise
        raise UserError(f"--base_model_name_or_path {name} is not a model: {first_line(error)}") from error


def stored_dtype(args: MergeArguments) -> str:
    """The dtype to write, as text: the flag's, or what the base's config names."""
    if args.dtype != "auto":
        return args.dtype
    config = AutoConfig.from_pretrained(args.base_model_name_or_path, trust_remote_code=args.trust_remote_code)
    return str(config.dtype or torch.float32).removeprefix("torch.")


@torch.no_grad()
def probe(model, tokenizer) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] (or scores [1]) of each probe text, in float32.

    One batch: a model whose weights stay on disk reads them once.
    """
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in PROBES]
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id or 0)
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits.float()
    return list(logits) if logits.ndim == 2 else [row[: len(text)] for row, text in zip(logits, rows, strict=True)]


def probe_streamed(streamed, whole: Callable, tokenizer) -> list[torch.Tensor]:
    """`probe` of a model whose weights stay on disk or, where parts read others' weights, of what whole() loads."""
    try:
        found = probe(streamed, tokenizer)
        if all(logits.isfinite().all() for logits in found):
            return found
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
    logger.info("The parts of this model read each other's weights: testing it needs all of them in memory")
    return probe(whole(), tokenizer)


def compare(expected: list[torch.Tensor], found: list[torch.Tensor]) -> dict:
    """Largest difference; root mean square of all, relative to the spread of the expected; share of equal top-1.

    Scores are so few that they may be close by chance: their mean size then stands in for their spread.
    """
    pairs = list(zip(expected, found, strict=True))
    differences = torch.cat([(a - b).flatten() for a, b in pairs])
    numbers, are_scores = torch.cat([a.flatten() for a in expected]), expected[0].ndim == 1
    spread = max(numbers.std().item(), numbers.abs().mean().item() if are_scores else 0.0, 1e-6)
    facts = {"largest_difference": differences.abs().max().item()}
    facts["relative_difference"] = differences.square().mean().sqrt().item() / spread
    if are_scores:
        return facts
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten().float() for a, b in pairs]).mean().item()
    return facts | {"equal_top1": same}


def merge(args: MergeArguments, config: PeftConfig, adapter: Path, tokenizer, staging: Path) -> dict:
    """Write the merged model into `staging` and prove it; returns the facts for merge.json."""
    name, scratch = args.base_model_name_or_path, staging / "converted"
    known = {"name": name, "fingerprint": fingerprint(name)}  # also opens each of its files once
    base, index = load(args, config, scratch / "base", torch.float32)
    grown = {}
    if rows := grown_vocabulary(base, adapter):
        grown = {"vocab_size": rows, "ignore_mismatched_sizes": True}
        base, index = load(args, config, scratch / "base", torch.float32, **grown)
    if config.task_type == "SEQ_CLS":  # reads a score just before the padding, so it needs a token for that
        pad_alike(base.config.get_text_config(), tokenizer, first="tokenizer")
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    try:
        model, weights = adapted(base, index, adapter)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{adapter} is not an adapter of this base: {one_line(error)}") from error

    def base_with_adapter():
        whole = auto_class(config).from_pretrained(name, dtype=torch.float32, **settings(args, config), **grown)
        whole.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return with_saved_adapter(whole, adapter, "default", trainable=False)

    expected = probe_streamed(model, base_with_adapter, tokenizer)

    stored = stored_dtype(args)
    dtype = getattr(torch, stored)
    target, _ = load(args, config, scratch / "target", dtype, **grown)
    target.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    merged = MergedWeights(model, weights, dtype)
    if apart := untie(target, merged):
        logger.info(f"{', '.join(apart)} no longer equals what the base tied it to: written as a tensor of its own")
    largest = max((path.stat().st_size for path in weight_files(name)), default="5GB")
    save_merged(target, merged, staging, args.max_shard_size or largest)
    tokenizer.save_pretrained(staging)

    code = {"trust_remote_code": args.trust_remote_code}
    written = opened(auto_class(config), staging, scratch / "read", torch.float32, **code)
    whole = partial(auto_class(config).from_pretrained, staging, dtype=torch.float32, **code)
    parity = compare(expected, probe_streamed(running(*written), whole, tokenizer))
    if not parity["relative_difference"] <= TOLERANCE[stored]:  # also true for NaN
        raise Fault(
            f"the merged model differs from the adapter model, nothing was kept: {parity}. Were it rounding to "
            f"{stored}, --dtype float32 would merge it"
        )
    shutil.rmtree(scratch, ignore_errors=True)
    tensors = {"merged": len(merged.errors), "largest_error": max(merged.errors.values(), default=0.0)}
    return {
        "base": known,
        "adapter": {"name": str(adapter), "sha256": size_and_hash(next(adapter.glob("adapter_model.*")))[1]},
        "trained_here": bool(recorded_base(adapter)),  # if not, a reward model is read in another way
        "dtype": stored,
        "untied": apart,
        "tensors": tensors,
        "parity": parity,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def write_gguf(llama_cpp: Path, folder: Path, name: str, tokenizer) -> dict:
    """Convert the merged model to folder/model.gguf, read that back, and return how they compare.

    llama.cpp's "auto" keeps 16 bits as they are, and makes float16 of float32.
    """
    target = folder / "model.gguf"
    command = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", folder, "--outfile", target, "--outtype", "auto"]
    command += ["--model-name", name]  # by default that of the folder, which is another while it is made
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if ended.returncode:
        said = (ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}").splitlines()[-3:]
        raise Fault("llama.cpp's converter failed, nothing was kept: " + "\n".join(said))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = probe(model, tokenizer)
    read = {"gguf_file": target.name, "quantization_config": GgufConfig(dequantize=True), "config": model.config}
    try:  # with the known config: the reader leaves out a qwen3's head size, for one
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **read)
    except (ValueError, RuntimeError) as error:
        raise Fault(f"transformers cannot read model.gguf back, nothing was kept: {error}") from error
    parity = compare(expected, probe(found, tokenizer))
    if not parity["relative_difference"] <= TOLERANCE["bfloat16"]:
        raise Fault(f"model.gguf differs from the merged model, nothing was kept: {parity}")
    logger.info(f"model.gguf: logits differ by {parity['largest_difference']:.2g}, top-1 {parity['equal_top1']:.1%}")
    return parity


def move_into_place(staging: Path, output: Path) -> None:
    """Make `output` the merged model atomically: killed at any moment, it is as it was or all new.

    The new folder is assembled beside it (the rest of the old one as hard links) and the two are swapped. If nothing
    can be created beside it (a mount point, no permission), the files move one by one.
    """
    if os.path.ismount(output) or not os.access(output.parent, os.W_OK):
        return move_files(staging, output)
    new = output.with_name(f".{output.name}.merging")
    shutil.rmtree(new, ignore_errors=True)

    def staged(folder, names):
        return [staging.name] if Path(folder) == output else []

    try:
        shutil.copytree(output, new, copy_function=link_or_copy, ignore=staged, symlinks=True)
        shutil.move(staging, new)
        move_files(new / staging.name, new)
        exchange(new, output)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def move_files(staging: Path, folder: Path) -> None:
    """Move the merged files into `folder`, after its adapter is put aside. An old config.json is removed first and the
    new one comes last: without it from_pretrained refuses the folder."""
    new = sorted(staging.iterdir(), key=lambda path: path.name == "config.json")
    (folder / "config.json").unlink(missing_ok=True)
    for stale in {*folder.glob("model*.safetensors*"), *folder.glob("model.gguf")} - {folder / p.name for p in new}:
        stale.unlink()
    if (folder / "adapter_config.json").exists():
        (folder / "adapter").mkdir(exist_ok=True)
        weights = "adapter_model.bin", "adapter_model.safetensors"
        for name in ("README.md", "base.json", *weights, "adapter_config.json"):
            if (folder / name).exists():
                os.replace(folder / name, folder / "adapter" / name)
    for path in new:
        os.replace(path, folder / path.name)
    staging.rmdir()


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def exchange(first: Path, second: Path) -> None:
    """Swap two folders in one step or, if the file system cannot, in three."""
    libc, here, both = ctypes.CDLL(None, use_errno=True), -100, 2  # AT_FDCWD, RENAME_EXCHANGE of renameat2(2)
    names = os.fsencode(first), os.fsencode(second)
    if hasattr(libc, "renameat2") and libc.renameat2(here, names[0], here, names[1], both) == 0:
        return
    aside = second.with_name(first.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(second, aside)
    os.rename(first, second)
    os.rename(aside, first)


def upload(folder: Path, name: str) -> None:
    """Put the merged model into the hub repository `name`, private when it is new."""
    HfApi().create_repo(name, private=True, exist_ok=True)
    of_model = ["config.json", "generation_config.json", "model*", "tokenizer*", "*.jinja", "merge.json"]
    HfApi().upload_folder(repo_id=name, folder_path=folder, allow_patterns=of_model, ignore_patterns=["*/*"])
    logger.info(f"Uploaded to https://huggingface.co/{name}")


def terminated(number: int, frame) -> None:
    """SIGTERM ends the merge as Ctrl-C does, which cleans up; a second one does not end the cleaning."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main():
    (args,) = parse_arguments(MergeArguments)
    give_memory_back()
    if (adapter := adapter_folder(args.peft_model_path)) is None:
        raise UserError(
            f"--peft_model_path {args.peft_model_path} holds no adapter_config.json: name the output folder of a stage"
        )
    config = adapter_config(adapter)
    if config.peft_type != PeftType.LORA:
        raise UserError(f"{adapter} is a {config.peft_type} adapter: only LoRA and its forms are merged here")
    args.base_model_name_or_path = args.base_model_name_or_path or config.base_model_name_or_path
    check(args, config, adapter)
    check_base(adapter, args.base_model_name_or_path, args.force)
    named = config.base_model_name_or_path
    if named and not recorded_base(adapter) and not is_base(adapter, args.base_model_name_or_path):
        logger.warning(
            f"{adapter} names {named} as its base, and has no base.json by which to tell whether "
            f"{args.base_model_name_or_path} is the same: taking it as such"
        )
    tokenizer = load_tokenizer(args, adapter)
    if args.push_to_hub:
        check_hub(args.push_to_hub)
    output = Path(args.output_dir).resolve()
    if not hold_folder(output):
        raise UserError(
            f"--output_dir {args.output_dir}: another run is writing there. Wait for its end, or name another folder"
        )
    staging = output / ".merging"
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        facts = merge(args, config, adapter, tokenizer, staging)
        if args.gguf:
            facts["gguf"] = write_gguf(Path(args.gguf), staging, output.name, tokenizer)
        (staging / "merge.json").write_text(json.dumps(facts, indent=2))
        move_into_place(staging, output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if not any(output.iterdir()):
            output.rmdir()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    parity, tensors = facts["parity"], facts["tensors"]
    top = f", equal top-1 {parity['equal_top1']:.1%}" if "equal_top1" in parity else ""
    logger.info(
        f"Merged {adapter} into {output} ({facts['dtype']}): {tensors['merged']} matrices off by at most "
        f"{tensors['largest_error']:.1g} of their largest number; {'logits' if top else 'scores'} by "
        f"{parity['largest_difference']:.2g}{top}"
    )
    if args.push_to_hub:
        upload(output, args.push_to_hub)


if __name__ == "__main__":
    run_stage(main)
