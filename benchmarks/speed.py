"""PT, SFT and RM here, in TRL, LLaMA-Factory and MedicalGPT: same model, records, LoRA, batch and machine, in turn.

    python benchmarks/speed.py --model models/SmolLM2-135M-Instruct
    python benchmarks/speed.py --model models/SmolLM2-135M-Instruct --stages sft --contestants "ours,TRL"
    python benchmarks/speed.py --model models/SmolLM2-135M-Instruct --medicalgpt ../MedicalGPT  # a checkout of it

Every contestant passes once over the same records in a process of its own, with its own defaults but for the LoRA
(rank 8 on all linear layers), 512 tokens and batches of 4 (RM: 4 pairs). Dropout in the LoRA, which costs a float32
step up to a quarter, is by default 0 here and in LLaMA-Factory, 0.05 in TRL and MedicalGPT; --lora_dropout gives all
the same. Tokens are those of the records in the model's chat template, padding not counted, so that a second means the
same for all. Prints markdown: medians of tokens a second of training, of the seconds before and after it (imports,
loading, tokenizing, saving), and the highest peak memory; and how many tokens a second the machine's matrix products
would allow. LLaMA-Factory gets an environment of its own, and so does MedicalGPT: with the packages of ours, which its
requirements allow, and what it wants beside.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from measure import ROOT, as_run_scripts, environment_of, llama_factory, machine, measure

SCRIPTS = {"pt": "pretraining.py", "sft": "supervised_finetuning.py", "rm": "reward_modeling.py"}
MEDICALGPT_PACKAGES = ["scikit-learn", "sentencepiece", "tqdm", "latex2sympy2_extended", "math-verify==0.5.2"]
OURS = {
    "ours": [],
    "ours fp32": ["--precision", "fp32"],
    "ours fp32 recomputed": ["--precision", "fp32", "--activation_checkpointing"],  # as LLaMA-Factory has it
    "ours fp32 half recomputed": [
        *("--precision", "fp32", "--activation_checkpointing"),
        *("--activation_checkpointing_kwargs", '{"every_n_layers": 2}'),
    ],
    "ours packed": ["--packing", "--packing_length", "1024", "--per_device_train_batch_size", "2"],
}
FLOAT32 = ["ours fp32", "ours fp32 half recomputed", "ours fp32 recomputed"]
CONTESTANTS = {
    "pt": ["ours", *FLOAT32, "LLaMA-Factory", "MedicalGPT"],
    "sft": ["ours", "ours packed", *FLOAT32, "TRL", "TRL fp32", "LLaMA-Factory", "MedicalGPT"],
    # MedicalGPT's (2f1008c) hands load_in_4bit to a model class, which transformers 5.23 does not accept
    "rm": ["ours", *FLOAT32, "TRL", "TRL fp32", "LLaMA-Factory"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model with a chat template")
    parser.add_argument("--stages", default="pt,sft,rm")
    parser.add_argument("--contestants", help="comma list; default: all that know the stage")
    parser.add_argument("--medicalgpt", type=Path, help="folder of a checkout; without it that one is left out")
    parser.add_argument("--records", type=int, default=64, help="conversations, pairs, documents")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lora_dropout", type=float, help="of every contestant; default: its own")
    return parser.parse_args()


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data" / name).read_text("utf-8").splitlines()]


def records(stage: str, count: int) -> list[dict]:
    """Records in the common forms: {"text"}, {"instruction", "output"}, {"instruction", "chosen", "rejected"}."""
    if stage == "pt":
        return [*read("pretrain/train/en.jsonl"), *read("pretrain/train/en_topics.jsonl")][:count]
    if stage == "sft":
        rows = [row for row in read("finetune/train/en_instructions.jsonl") if not row["input"]]
        return [{"instruction": row["instruction"], "output": row["output"]} for row in rows[:count]]
    rows = [row for row in read("reward/train/en.jsonl") if not row["history"] and not row["system"]]
    names = {"question": "instruction", "response_chosen": "chosen", "response_rejected": "rejected"}
    return [{new: row[old] for old, new in names.items()} for row in rows[:count]]


def in_form_of(contestant: str, row: dict) -> dict:
    """A record as that project reads it."""
    question = row.get("instruction")
    prompt = [{"role": "user", "content": question}]

    def answer(key):
        return [{"role": "assistant", "content": row[key]}]

    if contestant.startswith("TRL") and "output" in row:
        return {"prompt": prompt, "completion": answer("output")}
    if contestant.startswith("TRL"):
        return {"prompt": prompt, "chosen": answer("chosen"), "rejected": answer("rejected")}
    if contestant == "MedicalGPT" and "output" in row:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": row["output"]}]
        return {"conversations": turns}
    if contestant == "MedicalGPT" and "chosen" in row:
        turns = [{"from": "human", "value": question}]
        return {"conversations": turns, "chosen": row["chosen"], "rejected": row["rejected"]}
    if contestant.startswith("ours") and "chosen" in row:
        return {"question": question, "response_chosen": row["chosen"], "response_rejected": row["rejected"]}
    return row


def count_tokens(model: str, rows: list[dict]) -> int:
    """Tokens of the records, an end-of-text behind each document; conversations in the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if "text" in rows[0]:
        return sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows)
    keys = [key for key in ("output", "chosen", "rejected") if key in rows[0]]
    pairs = [(row["instruction"], row[key]) for row in rows for key in keys]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    return sum(len(tokenizer.apply_chat_template(turn)["input_ids"]) for turn in turns)


def our_command(stage: str, contestant: str, args, data: Path, output: Path) -> list:
    command = [sys.executable, SCRIPTS[stage], "--model_name_or_path", args.model, "--train_file_dir", data]
    command += ["--output_dir", output, "--do_eval", False, "--num_train_epochs", 1]
    command += ["--per_device_train_batch_size", 4, "--lora_rank", 8, "--report_to", "none"]
    command += ["--block_size", 512] if stage == "pt" else ["--max_source_length", 256, "--max_target_length", 256]
    return command + ["--validation_split_percentage", 1, "--save_strategy", "no", *OURS[contestant]]


def trl_command(stage: str, contestant: str, args, data: Path, output: Path) -> list:
    """The script itself: TRL's launcher leaves a CPU one thread."""
    command = [sys.executable, "-m", f"trl.scripts.{'sft' if stage == 'sft' else 'reward'}", "--use_peft"]
    command += ["--model_name_or_path", args.model, "--dataset_name", data, "--output_dir", output]
    command += ["--lora_r", 8, "--lora_alpha", 16, "--lora_target_modules", "all-linear"]
    command += ["--lora_task_type", "CAUSAL_LM" if stage == "sft" else "SEQ_CLS"]
    command += ["--max_length", 512, "--per_device_train_batch_size", 4, "--num_train_epochs", 1]
    command += ["--save_strategy", "no", "--report_to", "none", "--use_cpu", "True"]
    return command + (["--bf16", "False"] if "fp32" in contestant else [])


def medicalgpt_command(stage: str, args, data: Path, output: Path) -> list:
    """Its defaults but for float32 in SFT, whose default is float16, which a CPU cannot train."""
    python = environment_of(".medicalgpt", ["-r", ROOT / "requirements.txt", *MEDICALGPT_PACKAGES]) / "python"
    command = [python, args.medicalgpt.resolve() / "training" / SCRIPTS[stage], "--model_name_or_path", args.model]
    command += ["--train_file_dir", data, "--output_dir", output, "--do_train", "--num_train_epochs", 1]
    held_out = data.parent / "held-out"  # it wants some, and does not look at them
    held_out.mkdir()
    (held_out / "rows.jsonl").write_text((data / "rows.jsonl").read_text("utf-8").partition("\n")[0], "utf-8")
    command += ["--validation_file_dir", held_out, "--per_device_train_batch_size", 4, "--target_modules", "all"]
    command += ["--lora_rank", 8, "--lora_alpha", 16, "--torch_dtype", "float32"]
    command += ["--save_strategy", "no", "--report_to", "none", "--preprocessing_num_workers", 1]
    lengths = {"pt": ["--block_size", 512], "sft": ["--model_max_length", 512]}
    pairs = ["--max_source_length", 256, "--max_target_length", 256, "--remove_unused_columns", False]
    return command + lengths.get(stage, pairs)


def factory_command(stage: str, args, data: Path, output: Path) -> list:
    columns = {"pt": {"prompt": "text"}, "sft": {"prompt": "instruction", "response": "output"}}
    pairs = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    known = {"file_name": "rows.jsonl", "ranking": stage == "rm", "columns": columns.get(stage, pairs)}
    (data / "dataset_info.json").write_text(json.dumps({"rows": known}))
    settings = {"stage": stage, "do_train": True, "model_name_or_path": args.model, "dataset": "rows"}
    settings |= {"dataset_dir": data, "output_dir": output, "template": "chatml", "finetuning_type": "lora"}
    settings |= {"lora_rank": 8, "lora_alpha": 16, "lora_target": "all", "cutoff_len": 512}
    settings |= {"per_device_train_batch_size": 4, "num_train_epochs": 1, "save_strategy": "no", "report_to": "none"}
    if args.lora_dropout is not None:
        settings["lora_dropout"] = args.lora_dropout
    (data / "settings.yaml").write_text(json.dumps(settings, default=str))  # JSON is YAML
    return [llama_factory(), "train", data / "settings.yaml"]


def run(stage: str, contestant: str, args, rows: list[dict], folder: Path) -> tuple[float, float, float]:
    """Seconds of training, of all the rest, and peak GiB."""
    data, output = folder / "data", folder / "output"
    data.mkdir(parents=True)
    text = "".join(json.dumps(in_form_of(contestant, row), ensure_ascii=False) + "\n" for row in rows)
    (data / "rows.jsonl").write_text(text, "utf-8")
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(folder / "cache")}
    if contestant.startswith("ours"):
        environment |= as_run_scripts()
        command = our_command(stage, contestant, args, data, output)
    elif contestant.startswith("TRL"):
        command = trl_command(stage, contestant, args, data, output)
    elif contestant == "MedicalGPT":
        environment |= {"PYTHONPATH": str(args.medicalgpt.resolve())}
        command = medicalgpt_command(stage, args, data, output)
    else:
        command = factory_command(stage, args, data, output)
    if args.lora_dropout is not None and contestant != "LLaMA-Factory":  # whose settings file has it
        command += ["--lora_dropout", args.lora_dropout]
    whole, memory, printed = measure(command, environment)
    return training_seconds(output, printed), whole, memory


def training_seconds(output: Path, printed: str) -> float:
    """transformers.Trainer's train_runtime, from the file of results or the last line that tells it."""
    found = output / "train_results.json"
    if found.exists():
        return json.loads(found.read_text())["train_runtime"]
    return float(printed.rpartition("train_runtime': ")[2].strip("'").partition("'")[0].partition(",")[0])


def median_seconds(product) -> float:
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def seconds_of_products(model, dtype, rows: int = 4, length: int = 512, rank: int = 8) -> float:
    """Seconds of the matrix products of a PT step, each at its own shape, if nothing else took time.

    Of every linear layer: forward, and the gradient of its input; the same and the gradients of A and B for its LoRA;
    of attention two products forward and four backward, of which a causal one needs half.
    """
    import torch

    def random(*shape):
        return torch.randn(*shape, dtype=dtype)

    config, tokens, total = model.config, rows * length, 0.0
    layers = [layer.weight.shape for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    for (out, into), count in Counter(layers).items():
        weight, entering, leaving = random(out, into), random(tokens, into), random(tokens, out)
        products = [(entering, weight.T), (leaving, weight)]
        if out < config.vocab_size:
            a, b, thin = random(rank, into), random(out, rank), random(tokens, rank)
            products += [(entering, a.T), (thin, b.T), (leaving, b), (leaving.T, thin), (thin, a), (thin.T, entering)]
        total += count * sum(median_seconds(lambda pair=pair: pair[0] @ pair[1]) for pair in products)
    heads, size = rows * config.num_attention_heads, getattr(config, "head_dim", None)  # not every config tells it
    states = random(heads, length, size or config.hidden_size // config.num_attention_heads)
    scores = random(heads, length, length)
    attention = 3 * median_seconds(lambda: states @ states.mT) + 3 * median_seconds(lambda: scores @ states)
    return total + config.num_hidden_layers * attention / 2


def limits(name: str) -> str:
    """Tokens a second if all of it were matrix products: a weight is used once forward and once, frozen, backward."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    weights, lines = sum(w.numel() for w in model.parameters()), []
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(2048, 2048, dtype=dtype)
        speed = 2 * 2048**3 / median_seconds(lambda square=square: square @ square)
        reached = 4 * 512 / seconds_of_products(model, dtype)
        bound = f"{speed / 1e9:.0f} GFLOP/s in {dtype}, so at most {speed / (4 * weights):.0f} tokens/s by the weights"
        lines.append(f"{bound}, {reached:.0f} by all products of a PT step at their own shapes")
    return "; ".join(lines)


def main():
    args = arguments()
    print(f"{machine()}; {limits(args.model)}\n")
    for stage in args.stages.split(","):
        rows = records(stage, args.records)
        tokens = count_tokens(args.model, rows)
        names = args.contestants.split(",") if args.contestants else CONTESTANTS[stage]
        names = [name for name in CONTESTANTS[stage] if name in names and (args.medicalgpt or name != "MedicalGPT")]
        found = {name: [] for name in names}
        for number in range(args.repeats):
            for name in names:
                with tempfile.TemporaryDirectory() as folder:
                    found[name].append(run(stage, name, args, rows, Path(folder)))
                print(f"{stage}, {number}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
        print(f"{stage}: {len(rows)} records, {tokens} tokens\n")
        print("| | tokens/s, median (lowest-highest) | the rest, s | GiB at the peak |\n|---|---|---|---|")
        for name, runs in found.items():
            speeds = [tokens / seconds for seconds, _, _ in runs]
            rest = statistics.median(whole - seconds for seconds, whole, _ in runs)
            most = max(memory for _, _, memory in runs)
            cell = f"{statistics.median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})"
            print(f"| {name} | {cell} | {rest:.0f} | {most:.1f} |")
        print(flush=True)


if __name__ == "__main__":
    main()
