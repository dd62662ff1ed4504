"""Merging a LoRA into a large sharded model: this project, peft's load-merge-save, and LLaMA-Factory's export.

    python benchmarks/merge.py --tokenizer models/SmolLM2-135M-Instruct             # needs 18 GB of disk
    python benchmarks/merge.py --tokenizer models/SmolLM2-135M-Instruct --layers 2  # a small one, to try it

Builds a llama of 3 billion random bfloat16 weights in files of 1 GB and an adapter, then runs the contestants in turn,
each in a process of its own that ends with the files on the disk (sync), beside copying the base's files. Prints a
markdown table: seconds, and the peak resident memory of the process. LLaMA-Factory gets an environment of its own in
benchmarks/.llamafactory.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from measure import llama_factory, machine, measure

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(output, max_shard_size="1GB")
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of any tokenizer, for the texts of the proof")
    parser.add_argument("--layers", type=int, default=30, help="of 101 million weights each; 30 make 3.3 billion")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contestants", default="copying,ours,peft,LLaMA-Factory")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the models go, on the disk to measure")
    return parser.parse_args()


def build(args, folder: Path) -> None:
    """folder/base: a llama in bfloat16 of random weights, file by file; folder/adapter: LoRA on every linear layer."""
    import torch
    from accelerate import init_empty_weights
    from huggingface_hub import split_torch_state_dict_into_shards
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=args.layers,
        num_attention_heads=24,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    with init_empty_weights():
        model = LlamaForCausalLM(config).bfloat16()
    shapes = model.state_dict()
    split = split_torch_state_dict_into_shards(shapes, max_shard_size="1GB")
    (folder / "base").mkdir()
    for name, tensors in split.filename_to_tensors.items():
        made = {t: torch.empty(shapes[t].shape, dtype=torch.bfloat16).normal_(std=0.02) for t in tensors}
        save_file(made, folder / "base" / name, {"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "base/model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    lora = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    made = {name.replace(".default", ""): torch.randn(t.shape) * 0.02 for name, t in lora.items()}
    model.peft_config["default"].inference_mode = True
    model.peft_config["default"].save_pretrained(folder / "adapter")
    save_file(made, folder / "adapter/adapter_model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder / "adapter")


def factory_command(folder: Path, output: Path) -> list:
    """LLaMA-Factory's export, in its own environment, made when missing."""
    settings = {"model_name_or_path": folder / "base", "adapter_name_or_path": folder / "adapter", "template": "empty"}
    settings |= {"export_dir": output, "export_size": 1, "export_device": "cpu"}
    (folder / "export.yaml").write_text(json.dumps(settings, default=str))  # JSON is YAML
    return [llama_factory(), "export", folder / "export.yaml"]


def command(contestant: str, folder: Path, output: Path) -> list:
    base, adapter = folder / "base", folder / "adapter"
    if contestant == "copying":
        return ["cp", "-r", base, output]
    if contestant == "ours":
        names = ("--base_model_name_or_path", base, "--peft_model_path", adapter, "--output_dir", output)
        return [sys.executable, "merge_peft_adapter.py", *names]
    if contestant == "peft":
        return [sys.executable, "-c", PEFT, base, adapter, output]
    return factory_command(folder, output)


def main():
    args = arguments()
    names = args.contestants.split(",")
    found = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        building = multiprocessing.get_context("spawn").Process(target=build, args=(args, folder))
        building.start()  # beside this process, whose peak the measured ones would inherit
        building.join()
        if building.exitcode:
            raise SystemExit("the model could not be built")
        sizes = [file.stat().st_size / 2**30 for file in (folder / "base").glob("*.safetensors")]
        for _ in range(args.repeats):
            for contestant in names:
                line = shlex.join(map(str, command(contestant, folder, folder / "output")))
                environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
                seconds, memory, _ = measure(["bash", "-c", f"{line} && sync"], environment)
                found[contestant].append((seconds, memory))
                print(f"{contestant}: {seconds:.1f} s, {memory:.2f} GiB", file=sys.stderr, flush=True)
                shutil.rmtree(folder / "output")
    print(f"{machine()}\n\n{sum(sizes):.2f} GiB in {len(sizes)} files, the largest {max(sizes):.2f} GiB\n")
    print("| | seconds, median (all) | GiB at the peak |\n|---|---|---|")
    for contestant, runs in found.items():
        times = sorted(seconds for seconds, _ in runs)
        every = ", ".join(f"{seconds:.1f}" for seconds in times)
        print(f"| {contestant} | {statistics.median(times):.1f} ({every}) | {max(m for _, m in runs):.2f} |")


if __name__ == "__main__":
    main()
