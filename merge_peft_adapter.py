"""Between stages: merge a LoRA adapter into its base model, and prove the result before keeping it.

    python merge_peft_adapter.py --base_model_name_or_path models/SmolLM2-135M-Instruct --peft_model_path outputs/pt \
        --output_dir outputs/pt-merged

Reads   the base model and an adapter of a causal language model or of a reward model (its score head comes along).
Writes  a plain model with tokenizer and chat template, that from_pretrained loads, and merge.json with the proof.
        output_dir may be the adapter's own folder: the adapter then moves into its subfolder adapter/, since
        transformers would add an adapter beside merged weights a second time.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from loguru import logger
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from arguments import UserError, check_base, parse_arguments, run_stage

PROBES = (
    "What are the symptoms of influenza, and when should I see a doctor?",
    "高血压患者平时要注意什么？",
    "The treatment of asthma rests on inhaled medicines that",
)
# Largest difference of logits, relative to their own spread, that rounding the weights to a dtype explains.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass
class MergeArguments:
    """What is merged into what."""

    base_model_name_or_path: str | None = field(default=None, metadata={"help": "Default: what the adapter names."})
    peft_model_path: str = field(default="", metadata={"help": "Folder of the adapter. Required."})
    output_dir: str = field(default="", metadata={"help": "Where the merged model goes. Required."})
    model_type: str | None = field(default=None, metadata={"help": "Accepted from older scripts; the config decides."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the written weights: auto is the base's own. Merging itself runs in float32.",
            "choices": ["auto", "float32", "float16", "bfloat16"],
        },
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "Larger models are written as several files."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})
    force: bool = field(default=False, metadata={"help": "Merge into another base than the adapter was trained on."})

    def __post_init__(self):
        for flag in ("peft_model_path", "output_dir"):
            if not getattr(self, flag):
                raise UserError(f"--{flag} is missing")


def find_adapter(path: str) -> Path:
    """The folder with adapter_config.json: `path`, or its adapter/ after an earlier merge in place."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise UserError(f"--peft_model_path {path} holds no adapter_config.json: name the output folder of a stage")


def load_base(args: MergeArguments, config: PeftConfig):
    """The base model in float32, with the head that the adapter's task needs."""
    name = args.base_model_name_or_path or config.base_model_name_or_path
    kwargs = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code}
    try:
        if config.task_type == "SEQ_CLS":
            return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **kwargs)
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        raise UserError(f"--base_model_name_or_path {name} is no model: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def probe(model, tokenizer) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] (or scores [1]) of each probe text, in float32."""
    model.eval()
    outputs = [model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits for text in PROBES]
    return [logits[0].float() for logits in outputs]


def compare(expected: list[torch.Tensor], found: list[torch.Tensor]) -> dict:
    """Largest difference, absolute and relative to the spread of the expected logits, and share of equal top-1."""
    pairs = list(zip(expected, found, strict=True))
    largest = max((a - b).abs().max().item() for a, b in pairs)
    spread = max(torch.cat([a.flatten() for a in expected]).std().item(), 1e-6)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten().float() for a, b in pairs]).mean().item()
    return {"largest_difference": largest, "relative_difference": largest / spread, "equal_top1": same}


def move_into_place(staging: Path, output: Path) -> None:
    """Put the merged files into `output`. The adapter goes aside first and config.json comes last, so that a kill in
    between leaves a folder that from_pretrained refuses, and that the same command completes."""
    names = ("adapter_config.json", "adapter_model.safetensors", "base.json", "README.md")
    adapter_files = [output / name for name in names]
    if adapter_files[0].exists():
        (output / "adapter").mkdir(exist_ok=True)
        for path in reversed(adapter_files):
            if path.exists():
                os.replace(path, output / "adapter" / path.name)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    staging.rmdir()


def main():
    (args,) = parse_arguments(MergeArguments)
    adapter = find_adapter(args.peft_model_path)
    adapter_config = PeftConfig.from_pretrained(adapter)
    check_base(adapter, args.base_model_name_or_path or adapter_config.base_model_name_or_path, args.force)
    base = load_base(args, adapter_config)
    dtype = args.dtype if args.dtype != "auto" else stored_dtype(args, adapter_config)
    tokenizer = AutoTokenizer.from_pretrained(args.peft_model_path, trust_remote_code=args.trust_remote_code)
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id

    try:
        model = PeftModel.from_pretrained(base, adapter)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{adapter} is not an adapter of this base: {str(error).strip().splitlines()[0]}") from error
    expected = probe(model, tokenizer)
    merged = model.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))

    output = Path(args.output_dir)
    staging = output / ".merging"
    shutil.rmtree(staging, ignore_errors=True)
    merged.save_pretrained(staging, max_shard_size=args.max_shard_size)
    tokenizer.save_pretrained(staging)

    found = probe(type(merged).from_pretrained(staging, dtype=torch.float32), tokenizer)
    parity = compare(expected, found)
    if not parity["relative_difference"] <= TOLERANCE[dtype]:  # also true for NaN
        shutil.rmtree(staging)
        raise RuntimeError(f"the merged model differs from the adapter model, nothing was kept: {parity}")
    facts = {"base": base.config._name_or_path, "adapter": str(adapter), "dtype": dtype, "parity": parity}
    (staging / "merge.json").write_text(json.dumps(facts, indent=2))
    move_into_place(staging, output)
    logger.info(
        f"Merged {adapter} into {output} ({dtype}): largest difference of logits "
        f"{parity['largest_difference']:.2g}, equal top-1 {parity['equal_top1']:.1%}"
    )


def stored_dtype(args: MergeArguments, adapter_config: PeftConfig) -> str:
    """The dtype that the base's config names, as text."""
    name = args.base_model_name_or_path or adapter_config.base_model_name_or_path
    dtype = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code).dtype or torch.float32
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    run_stage(main)
