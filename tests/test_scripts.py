"""The scripts, launched as users do: every stage on small random models, with numbers pinned.

Most launches run the script's __main__ in this process (conftest.in_process), which spares its imports; the commands
of 2023, one error and the run on two ranks are processes of their own.
"""

import ctypes
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    ADAPTER,
    DOCUMENTS,
    QUESTIONS,
    ROOT,
    SCRIPTS,
    SHORT,
    assert_curves,
    history,
    in_process,
    in_subprocess,
    merge,
    results,
    stage,
    write_lines,
    write_records,
)
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, MambaConfig

from arguments.command_line import UserError
from scripts.check_inputs import check_flags

PROBES = ("What helps a sprained ankle? Rest", "高血压患者平时")


@torch.no_grad()
def logits(model, tokenizer) -> torch.Tensor:
    """Logits of the probes at every token (or their scores), flat."""
    found = [model.eval()(**tokenizer(p, return_tensors="pt", return_token_type_ids=False)).logits for p in PROBES]
    return torch.cat([one.float().flatten() for one in found])


def assert_merged(auto_class, base, adapter: Path, merged: Path, moved: float = 1e-3) -> None:
    """from_pretrained(merged) computes what base + adapter does, and the adapter made a difference of `moved`."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    kwargs = {"num_labels": 1} if auto_class is AutoModelForSequenceClassification else {}
    plain = auto_class.from_pretrained(base, dtype=torch.float32, **kwargs)
    plain.config.pad_token_id = tokenizer.pad_token_id
    before = logits(plain, tokenizer)
    expected = logits(PeftModel.from_pretrained(plain, adapter), tokenizer)
    found = logits(auto_class.from_pretrained(merged, dtype=torch.float32), tokenizer)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > moved, "the adapter changed nothing: this test would pass without it"


# --- every family


@pytest.mark.parametrize("family", FAMILIES)
def test_family_through_all_stages(family, tiny, records, tmp_path):
    model, previous = tiny(family), tiny(family)
    for name in ("pt", "sft", "rm"):
        in_process(*stage(name, previous, records, tmp_path / name)).ok()
        in_process(*merge(previous, tmp_path / name, tmp_path / f"{name}-merged")).ok()
        assert json.loads((tmp_path / f"{name}-merged/merge.json").read_text())["parity"].get("equal_top1", 1) > 0.99
        previous = tmp_path / f"{name}-merged" if name != "rm" else previous
    rl = tmp_path / "rl"
    ended = in_process(*stage("rl", previous, records, rl, "--reward_model_name_or_path", tmp_path / "rm")).ok()
    assert "one base model in memory" in ended.stderr
    in_process(*merge(previous, rl, tmp_path / "rl-merged")).ok()

    final = AutoModelForCausalLM.from_pretrained(tmp_path / "rl-merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rl-merged")
    text = "流感 and asthma?\n  Yes."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert final.config.model_type == AutoModelForCausalLM.from_pretrained(model).config.model_type
    assert_merged(AutoModelForCausalLM, previous, rl, tmp_path / "rl-merged", moved=1e-5)
    assert all(0 < results(tmp_path / name)["eval_loss"] < 7 for name in ("pt", "sft", "rm"))
    assert history(rl, "kl")[0] == 0.0
    assert results(rl)["eval_length"] <= 8


# --- the commands of 2023

FLAGS_2023 = shlex.split(
    """--model_type bloom --torch_dtype float16 --fp16 --device_map auto --do_train --do_eval --use_peft True
    --seed 42 --max_train_samples 1000 --max_eval_samples 10 --num_train_epochs 1 --learning_rate 1e-2
    --warmup_ratio 0.05 --weight_decay 0.01 --logging_strategy steps --logging_steps 1 --eval_steps 50
    --evaluation_strategy steps --save_steps 500 --save_strategy steps --save_total_limit 3
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --preprocessing_num_workers 1 --overwrite_output_dir --overwrite_cache --ddp_timeout 30000
    --logging_first_step True --target_modules all --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05
    --report_to tensorboard --ddp_find_unused_parameters False --gradient_checkpointing True"""
)
LENGTHS_2023 = ["--max_source_length", "64", "--max_target_length", "32"]
RL_FLAGS_2023 = shlex.split(
    """--model_type bloom --torch_dtype float16 --device_map auto --max_train_samples 1000 --use_peft True
    --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --do_train --max_steps 1 --learning_rate 1e-2 --save_steps 50
    --batch_size 8 --max_source_length 64 --max_target_length 8 --early_stopping True --target_kl 0.1
    --reward_baseline 0.0 --log_with tensorboard"""
)
RENAMED = ("--overwrite_output_dir", "--warmup_ratio", "--evaluation_strategy", "--torch_dtype")
STAGE_FILES = {
    *("all_results.json", "train_results.json", "eval_results.json", "trainer_state.json", "training_args.bin"),
    *("tokenizer.json", "tokenizer_config.json", "runs"),
}


def assert_stage_files(output: Path, *adapter_files: str) -> None:
    present = {path.name for path in output.iterdir()}
    assert present >= STAGE_FILES | set(adapter_files)
    assert [*(output / "runs").rglob("events.out.tfevents*")]


def test_commands_of_2023(tiny, records, tmp_path):
    """Base bloom-560m, adapters outputs-*-v1, and each merged into its own folder, as that README told."""
    base = shutil.copytree(tiny("bloom"), tmp_path / "bloom-560m")
    outputs = {name: tmp_path / f"outputs-{name}-v1" for name in SCRIPTS}
    bases = {"pt": base, "sft": outputs["pt"], "rm": outputs["sft"], "rl": outputs["sft"]}
    data = {"pt": "pt", "sft": "sft", "rm": "rm", "rl": "sft"}  # RL on the SFT records
    for name, script in SCRIPTS.items():
        folder = records / data[name]
        flags = {"pt": [*FLAGS_2023, "--block_size", 32], "rl": RL_FLAGS_2023}.get(name, FLAGS_2023 + LENGTHS_2023)
        flags = [*flags, "--train_file_dir", folder, "--validation_file_dir", folder, "--output_dir", outputs[name]]
        if name == "rl":
            flags += ["--reward_model_name_or_path", outputs["rm"]]
        ended = in_subprocess(script, "--model_name_or_path", bases[name], *flags).ok()
        for flag in RENAMED if name != "rl" else ("--torch_dtype", "--log_with"):
            assert ended.stderr.count(f"{flag} is the old name of --") == 1
        assert "fp16 needs a GPU" in ended.stderr or name == "rl" or torch.cuda.is_available()
        assert name != "rl" or "an adapter on the policy's base: one base model in memory" in ended.stderr
        assert_stage_files(outputs[name], "adapter_config.json", ADAPTER)
        if name != "rl":  # one rollout is a point, not a curve
            assert_curves(outputs[name], "loss", "accuracy" if name == "rm" else "grad_norm")

        launch = in_subprocess if name == "pt" else in_process
        launch(*merge(bases[name], outputs[name], outputs[name]), "--model_type", "bloom").ok()
        generates = () if name == "rm" else ("generation_config.json",)
        assert_stage_files(outputs[name], "config.json", "model.safetensors", "adapter", *generates)
        assert not (outputs[name] / "adapter_config.json").exists()
        auto_class = AutoModelForSequenceClassification if name == "rm" else AutoModelForCausalLM
        assert_merged(auto_class, bases[name], outputs[name] / "adapter", outputs[name])

    lengths = history(outputs["rl"], "length")
    assert len(lengths) == 1 and lengths[0] <= 8
    assert results(outputs["rl"])["eval_prompts"] == 1  # held out, as training and validation folder are the same

    # The same command again, with --overwrite_output_dir: a new adapter, and nothing of the merge beside it.
    again = stage("sft", outputs["pt"], records, outputs["sft"], "--overwrite_output_dir")
    in_process(*again).ok()
    assert (outputs["sft"] / "adapter_config.json").exists()
    assert not any((outputs["sft"] / name).exists() for name in ("adapter", "config.json", "model.safetensors"))


# --- all weights


def test_all_weights_in_every_stage(tiny, records, tmp_path):
    """--use_peft False needs no merge; RL takes a reward model that is whole, and one merged from an adapter."""
    previous, full = tiny("qwen3"), ("--use_peft", False, "--learning_rate", 1e-3)
    for name in ("pt", "sft", "rm"):
        in_process(*stage(name, previous, records, tmp_path / name, *full)).ok()
        assert not (tmp_path / name / "adapter_config.json").exists()
        previous = tmp_path / name if name != "rm" else previous
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").num_labels == 1

    in_process(*stage("rm", previous, records, tmp_path / "rm-lora")).ok()
    in_process(*merge(previous, tmp_path / "rm-lora", tmp_path / "rm-merged")).ok()
    for reward in ("rm", "rm-merged"):
        output = tmp_path / f"rl-{reward}"
        flags = ("--reward_model_name_or_path", tmp_path / reward, "--critic", "adapter", *full)
        ended = in_process(*stage("rl", previous, records, output, *flags)).ok()
        assert "shares no base with a policy that trains all weights" in ended.stderr
        assert history(output, "kl")[0] == 0.0
        tokenizer = AutoTokenizer.from_pretrained(output)
        before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (previous, output))
        assert (logits(after, tokenizer) - logits(before, tokenizer)).abs().max() > 1e-5
        values = load_file(output / "value" / "model.safetensors")
        assert any((values[k] - v).abs().max() > 1e-6 for k, v in after.state_dict().items() if k in values)


# --- numbers

# What this very test finds (it shows that when it fails) on a CPU: tiny llama, eight records, seed 42, float32, three
# steps; SFT and RM see all eight at each, so their order does not matter. torch 2.13, transformers 5.23, trl 1.16.
PINNED = {"pt": 5.956208, "sft": 5.905325, "rm": 0.391601}


def test_pinned_losses(tiny, records, tmp_path):
    found = {}
    for name in PINNED:
        flags = ("--precision", "fp32", "--seed", 42, "--per_device_train_batch_size", 8, "--max_eval_samples", 8)
        in_process(*stage(name, tiny("llama"), records, tmp_path / name, *flags, "--use_cpu")).ok()
        found[name] = results(tmp_path / name)["eval_loss"]
    assert found == pytest.approx(PINNED, rel=1e-4)


def test_reward_accuracy_counts_pairs_and_names_kinds(tiny, tmp_path):
    """Seven pairs of unlike lengths in batches of four: the scores of each, one by one, give the same figures."""
    words = "It passes by itself in time , with rest .".split()  # noqa: SIM905
    kinds = ["unsafe", "wrong fact", "unsafe", ""]
    rows = [
        {
            "question": "What helps?",
            "response_chosen": " ".join(words[: 2 + i]),
            "response_rejected": " ".join(words[9 - i :]),
            "kind": kinds[i % 4],
        }
        for i in range(7)
    ]
    write_lines(tmp_path / "train", rows)
    for row in rows[1::2]:  # what was learned is wrong for every other held-out pair
        row["response_chosen"], row["response_rejected"] = row["response_rejected"], row["response_chosen"]
    write_lines(tmp_path / "held", rows)
    flags = ("--per_device_eval_batch_size", 4, "--max_eval_samples", 7, "--keep_duplicates", "--learning_rate", 1e-2)
    command = [SCRIPTS["rm"], "--model_name_or_path", tiny("llama"), "--output_dir", tmp_path / "rm", "--max_steps", 3]
    folders = ("--train_file_dir", tmp_path / "train", "--validation_file_dir", tmp_path / "held")
    in_process(*command, *folders, *flags, "--precision", "fp32").ok()
    in_process(*merge(tiny("llama"), tmp_path / "rm", tmp_path / "merged")).ok()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")

    @torch.no_grad()
    def score(question, answer) -> float:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        return model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits.item()

    scores = [[score(row["question"], row[f"response_{side}"]) for side in ("chosen", "rejected")] for row in rows]
    margins = [chosen - rejected for chosen, rejected in scores]
    (*_, line) = (tmp_path / "rm" / "margins.jsonl").read_text("utf-8").splitlines()
    placed = dict(zip(json.loads(line)["places"], json.loads(line)["margins"], strict=True))
    own = {f"{tmp_path}/held/rows.jsonl:{number}": margin for number, margin in enumerate(margins, 1)}
    assert placed == pytest.approx(own, abs=1e-4)
    found, scores = results(tmp_path / "rm"), sum(scores, [])
    of_scores = {"min": min(scores), "mean": statistics.fmean(scores), "max": max(scores)}
    assert {name: found[f"eval_{name}_reward"] for name in of_scores} == pytest.approx(of_scores, abs=1e-4)
    assert found["eval_margin"] == pytest.approx(sum(margins) / 7, abs=1e-4)
    assert found["eval_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins) / 7)
    for kind in ("unsafe", "wrong fact"):
        own = [margin > 0 for margin, row in zip(margins, rows, strict=True) if row["kind"] == kind]
        assert found[f"eval_accuracy_{kind}"] == pytest.approx(sum(own) / len(own))
    assert "eval_accuracy_" not in found and 0 < found["eval_accuracy"] < 1, "all alike: nothing is told apart"


# --- resume


@pytest.mark.parametrize("name", SCRIPTS)
def test_interrupted_run_goes_on(name, tiny, records, tmp_path):
    """Killed after its first checkpoint, a run ends with the weights of one that was not: in a later epoch too."""
    steps = ("--max_steps", 20, "--save_steps", 10, "--per_device_train_batch_size", 2)
    weights = [ADAPTER]
    if name == "rl":
        in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
        steps = ("--max_steps", 2, "--save_steps", 1, "--reward_model_name_or_path", tmp_path / "rm")
        steps += ("--critic", "adapter")
        weights += ["value/model.safetensors", "value/head.safetensors"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    in_process(*stage(name, tiny("llama"), records, whole, *steps, "--lora_dropout", 0.1)).ok()
    checkpoints = sorted(path.name for path in whole.glob("checkpoint-*"))
    assert checkpoints == (["checkpoint-2", "checkpoint-4"] if name == "rl" else ["checkpoint-10", "checkpoint-20"])
    epoch = json.loads((whole / checkpoints[0] / "trainer_state.json").read_text())["epoch"]
    assert name == "rl" or (epoch > 1 and epoch % 1), "the checkpoint does not lie inside a later epoch"

    shutil.copytree(whole / checkpoints[0], cut / checkpoints[0])
    ended = in_process(*stage(name, tiny("llama"), records, cut, *steps, "--lora_dropout", 0.1)).ok()
    assert f"Going on from {cut / checkpoints[0]}" in ended.stderr
    for file in weights:
        one, other = load_file(whole / file), load_file(cut / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        halfway = load_file(cut / checkpoints[0] / file)
        assert any(not torch.equal(one[key], halfway[key]) for key in one), "nothing happened after the checkpoint"
    keys = ("eval_loss", "eval_perplexity", "eval_accuracy", "eval_reward", "eval_kl")
    assert all(results(whole).get(key) == results(cut).get(key) for key in keys)


# --- Chinese


def test_chinese_record_in_every_stage(tiny, tmp_path):
    """A document, a conversation, a pair and a prompt, all Chinese: the tokens trained on decode to the text."""
    from arguments.data import DataArguments
    from pretraining import PretrainingArguments, build_blocks
    from reward_modeling import build_dataset as build_pairs
    from rl_training import build_dataset as build_prompts
    from supervised_finetuning import build_dataset as build_conversations

    document, (question, good, bad) = DOCUMENTS[-1], QUESTIONS[-1]
    data = write_records(tmp_path / "data", [document] * 2, [(question, good, bad)] * 2)
    for name in SCRIPTS:
        flags = ("--reward_model_name_or_path", tmp_path / "rm", "--batch_size", 2) if name == "rl" else ()
        in_process(*stage(name, tiny("qwen3"), data, tmp_path / name, *flags)).ok()
    tokenizer = {name: AutoTokenizer.from_pretrained(tmp_path / name) for name in SCRIPTS}

    def rows(name):
        loads = {"pt": "load_documents", "sft": "load_conversations", "rm": "load_pairs", "rl": "load_prompts"}
        arguments = DataArguments(str(data / name), str(data / name), keep_duplicates=True)
        return arguments, getattr(arguments, loads[name])()[0]

    args = PretrainingArguments(output_dir=str(tmp_path / "unused"), block_size=512)
    block = build_blocks(rows("pt")[1], tokenizer["pt"], rows("pt")[0], args)[0]
    trained = [i for i in block["labels"] if i != -100]
    assert tokenizer["pt"].decode(trained) == (document + "<|im_end|>") * 2

    arguments, read = rows("sft")
    row = build_conversations(read, tokenizer["sft"], arguments)[0]
    assert tokenizer["sft"].decode([i for i in row["labels"] if i != -100]) == f"{good}<|im_end|>"
    asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer["sft"].decode(row["input_ids"]) == f"{asked}{good}<|im_end|>"

    arguments, read = rows("rm")
    row = build_pairs(read, tokenizer["rm"], arguments)[0]
    decoded = [tokenizer["rm"].decode(row[key]) for key in ("chosen_ids", "rejected_ids")]
    assert decoded == [f"{asked}{good}<|im_end|>", f"{asked}{bad}<|im_end|>"]

    arguments, read = rows("rl")
    assert tokenizer["rl"].decode(build_prompts(read, tokenizer["rl"], arguments)[0]["input_ids"]) == asked
    samples = (tmp_path / "rl" / "samples.jsonl").read_text(encoding="utf-8")
    assert question in samples and json.loads(samples.splitlines()[0])["prompt"][-1]["content"] == question


# --- two ranks

ON_TWO_RANKS = """
import json, os, runpy, sys, torch
from transformers import Trainer

commands, folder = json.loads(open(sys.argv[1]).read()), sys.argv[2]
train = Trainer.train


def train_and_show(self, *args, **kwargs):
    result = train(self, *args, **kwargs)
    trained = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
    torch.save(trained, f"{folder}/{os.path.basename(sys.argv[0])}.{os.environ['RANK']}")
    return result


Trainer.train = train_and_show
torch.distributed.destroy_process_group = lambda: None  # at each script's end: the next one needs it
for command in commands:
    sys.argv = command
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)  # the first script's
    runpy.run_path(command[0], run_name="__main__")
"""


def test_two_ranks(tiny, records, tmp_path):
    """torchrun with two gloo ranks: every stage as on one with the same global batch."""
    llama = tiny("llama")
    in_process(*stage("rm", llama, records, tmp_path / "rm")).ok()
    exact = ("--precision", "fp32", "--use_cpu", "--max_eval_samples", 7)
    batch = "--per_device_train_batch_size"
    trained, rl = ("pt", "sft", "rm"), tmp_path / "rl"
    one, two = ({name: tmp_path / ranks / name for name in trained} for ranks in ("one", "two"))
    for name in trained:  # the second of two batches has two records, none for the other rank
        in_process(*stage(name, llama, records, one[name], *exact, batch, 6)).ok()
    epochs, whole, resumed = ("--max_steps", 7, "--save_steps", 5), tmp_path / "whole", tmp_path / "resumed"
    in_process(*stage("sft", llama, records, whole, *exact, batch, 6, *epochs)).ok()
    shutil.copytree(whole / "checkpoint-5", resumed / "checkpoint-5")  # in the third epoch

    reward = ("--reward_model_name_or_path", tmp_path / "rm", "--max_steps", 2, "--eval_on_start")
    reward += ("--use_cpu", "--precision", "fp32", "--max_eval_samples", 3, "--max_train_samples", 8)
    reward += ("--critic", "adapter", "--adap_kl_ctrl", "--kl_horizon", 8)
    batches = ("--batch_size", 4, "--mini_batch_size", 2)
    in_process(*stage("rl", llama, records, tmp_path / "rl-one", *reward, *batches, "--save_steps", 1)).ok()
    first = min((tmp_path / "rl-one").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.copytree(first, tmp_path / "rl-resumed" / first.name)
    commands = [stage(name, llama, records, two[name], *exact, batch, 3) for name in trained]
    commands = [stage("sft", llama, records, resumed, *exact, batch, 3, *epochs), *commands]
    batches = ("--batch_size", 2, "--mini_batch_size", 1)
    commands += [stage("rl", llama, records, output, *reward, *batches) for output in (tmp_path / "rl-resumed", rl)]
    (tmp_path / "driver.py").write_text(ON_TWO_RANKS)
    (tmp_path / "commands.json").write_text(json.dumps([list(map(str, command)) for command in commands]))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    in_subprocess(*torchrun, tmp_path / "driver.py", tmp_path / "commands.json", tmp_path, PYTHONPATH=str(ROOT)).ok()

    for alone, shared in [(one[name], two[name]) for name in trained] + [(whole, resumed)]:
        alone, shared = load_file(alone / ADAPTER), load_file(shared / ADAPTER)
        assert alone.keys() == shared.keys()
        for key in alone:
            torch.testing.assert_close(shared[key], alone[key], atol=1e-4, rtol=0)
    for name in trained:
        assert results(two[name])["eval_loss"] == pytest.approx(results(one[name])["eval_loss"], rel=1e-4)
    for script in ("pretraining.py", "supervised_finetuning.py", "reward_modeling.py", "rl_training.py"):
        first, second = (torch.load(tmp_path / f"{script}.{rank}") for rank in (0, 1))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    saved = load_file(rl / ADAPTER)
    last = {k.replace(".default", "").replace("policy.", "", 1): v for k, v in first.items() if ".default." in k}
    assert last.keys() == saved.keys() and all(torch.equal(last[key], saved[key]) for key in saved)

    for file in (ADAPTER, "value/model.safetensors", "value/head.safetensors"):
        alone = load_file(tmp_path / "rl-one" / file)
        for output in (rl, tmp_path / "rl-resumed"):
            shared = load_file(output / file)
            for key in alone:
                torch.testing.assert_close(shared[key], alone[key], atol=1e-5, rtol=0)
    assert len(set(history(rl, "kl_coef"))) == 2, "this test needs a price that moves"
    for key in ("reward", "kl", "length", "kl_coef"):
        assert history(rl, key) == pytest.approx(history(tmp_path / "rl-one", key), abs=1e-5)

    assert len((rl / "samples.jsonl").read_text("utf-8").splitlines()) == 2 * 3  # of both ranks' three prompts, twice
    for output in (*two.values(), rl):
        writers = {path.name.split(".")[-2] for path in (output / "runs").rglob("events.out.tfevents*")}
        assert len(writers) == 1, "more than one process wrote"
    assert results(rl)["eval_prompts"] == 3 and history(rl, "kl")[0] == 0.0
    for name, count in (("pt", "eval_tokens"), ("sft", "eval_tokens"), ("rm", "eval_pairs")):
        assert results(two[name])[count] == results(one[name])[count]


def test_an_error_that_all_ranks_meet_is_said_once(records, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    ended = in_subprocess(*torchrun, *stage("sft", tmp_path / "missing", records, tmp_path / "out"))
    assert ended.code == 1 and len(ended.errors) == 1 and f"{tmp_path / 'missing'} is not a model" in ended.errors[0]


# --- two machines, here as two launches on one


def test_two_machines_train_as_one(tiny, records, warm_python, tmp_path):
    """run_sft.sh on each of two nodes of one process: the loss of one process with the same global batch."""
    flags = [
        *map(str, SHORT["sft"]),
        "--validation_file_dir",
        str(records / "sft"),
        "--keep_duplicates",
        "--precision",
    ]
    flags += ["fp32", "--max_eval_samples", "4", "--save_strategy", "no", "--per_device_train_batch_size"]
    common = {"MODEL": tiny("llama"), "TRAIN": str(records / "sft"), "PYTHON": warm_python}
    one = common | {"OUTPUT": str(tmp_path / "one"), "MERGED": str(tmp_path / "one-merged")}
    subprocess.run(["bash", "scripts/run_sft.sh", *flags, "4"], cwd=ROOT, env=os.environ | one, check=True)

    port = str(random.Random(os.getpid()).randrange(20000, 40000))
    two = common | {"OUTPUT": str(tmp_path / "two"), "MERGED": str(tmp_path / "two-merged")}
    two |= {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHON_EXEC": warm_python}
    command = ["bash", "scripts/run_sft.sh", *flags, "2"]
    nodes = [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | two | {"NODE_RANK": rank}, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    errors = [node.communicate(timeout=300)[1].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors[0][-2000:] + errors[1][-2000:]
    assert results(tmp_path / "two")["eval_loss"] == pytest.approx(results(tmp_path / "one")["eval_loss"], rel=1e-4)
    assert (tmp_path / "two-merged" / "merge.json").exists()


def test_a_machine_waits_for_the_merge_of_this_run(tmp_path):
    """A merge.json older than the run is none; a merge that failed on machine 0 ends the waiting."""
    adapter, merged = tmp_path / "rm", tmp_path / "rm-merged"
    adapter.mkdir(), merged.mkdir()
    (adapter / "adapter_config.json").touch(), (adapter / "all_results.json").touch(), (merged / "merge.json").touch()

    def ended(age: int, limit: int) -> int:
        os.utime(merged / "merge.json", (0, (adapter / "all_results.json").stat().st_mtime - age))
        command = f"source scripts/env.sh; merge_stage base {adapter} {merged}"
        environment = os.environ | {"NODE_RANK": "1", "PYTHON": sys.executable}
        return subprocess.run(["timeout", str(limit), "bash", "-c", command], cwd=ROOT, env=environment).returncode

    assert ended(age=-1, limit=20) == 0
    assert ended(age=1, limit=1) == 124  # still waiting
    (adapter / "merge_failed").touch()
    os.utime(adapter / "merge_failed", (0, (adapter / "all_results.json").stat().st_mtime - 1))
    assert ended(age=1, limit=1) == 124  # of an earlier run
    (adapter / "merge_failed").touch()
    assert ended(age=1, limit=20) == 1


def test_a_folder_that_was_cleared_before_its_merge_is_an_error(tmp_path):
    command = f"source scripts/env.sh; merge_stage base {tmp_path} {tmp_path}-merged"
    for name, code in (("notes.txt", 1), ("config.json", 0)):
        (tmp_path / name).touch()
        ended = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=os.environ | {"PYTHON": "false"}, text=True, capture_output=True
        )
        assert ended.returncode == code, ended
    assert "holds a whole model: nothing to merge" in ended.stdout


@pytest.mark.parametrize(
    ("gpus", "environment", "expected"),
    [
        (0, {}, "py"),
        (1, {}, "py"),
        (4, {}, "py -m torch.distributed.run --nproc_per_node 4"),
        (4, {"GPUS": "0,2"}, "py -m torch.distributed.run --nproc_per_node 2"),
        (4, {"CUDA_VISIBLE_DEVICES": "1"}, "py"),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, "py"),
        (-1, {}, "py"),
    ],
)
def test_run_scripts_find_the_gpus(gpus, environment, expected, tmp_path):
    """One process per GPU: of all that nvidia-smi lists, or of those named."""
    smi = tmp_path / "nvidia-smi"
    listed = f"for i in $(seq {gpus}); do echo \"GPU $i: Tesla T4\"; echo '  MIG 1g.5gb'; done"
    smi.write_text("#!/bin/sh\n" + (listed if gpus >= 0 else "echo NVIDIA-SMI has failed; echo twice; exit 9"))
    smi.chmod(0o755)
    kept = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "py"}
    script = 'source scripts/env.sh; echo "${LAUNCH[*]}"; flag_value --a_seed 1 --a_seed 2 --output_dir=a --a-seed=3'
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, env=kept | environment, capture_output=True, text=True
    )
    assert ended.stdout.splitlines() == [expected, "3"], ended.stderr


def preloaded(**environment: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c", "source scripts/env.sh; source scripts/env.sh; echo ${LD_PRELOAD:-}"]
    kept = {"PATH": os.environ["PATH"], "PYTHON": sys.executable} | environment
    ended = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, check=True)
    assert not ended.stderr
    return ended.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is of Linux")
def test_run_scripts_take_tcmalloc_where_it_is_installed(tmp_path):
    try:
        ctypes.CDLL("libtcmalloc_minimal.so.4")
    except OSError:
        assert preloaded() == ""
    else:
        assert preloaded() == "libtcmalloc_minimal.so.4"
    libraries = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libm.so" in line]
    (tmp_path / "libtcmalloc_minimal.so.4").symlink_to(libraries[0])  # any library will do
    assert preloaded(LD_LIBRARY_PATH=str(tmp_path)) == "libtcmalloc_minimal.so.4"
    (tmp_path / "libjemalloc.so").symlink_to(libraries[0])
    own = str(tmp_path / "libjemalloc.so")
    assert preloaded(LD_PRELOAD=own) == own


def test_the_attention_that_is_asked_for(tiny, records, tmp_path):
    for name in ("sdpa", "eager"):
        in_process(*stage("sft", tiny("llama"), records, tmp_path / name, "--attn_implementation", name)).ok()
    sdpa, eager = (results(tmp_path / name)["eval_loss"] for name in ("sdpa", "eager"))
    assert sdpa == pytest.approx(eager, abs=0.02)
    ended = in_process(*stage("sft", tiny("llama"), records, tmp_path / "no", "--attn_implementation", "magic"))
    assert ended.code == 2 and "magic" in ended.errors[0]


def test_python_is_found_or_said_to_be_too_old(tmp_path):
    """Ubuntu 22.04's python3 is 3.10, whatever else is installed; and so is the .venv that it made."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    path, environment = tmp_path / "bin", tmp_path / ".venv" / "bin"
    path.mkdir(), environment.mkdir(parents=True)
    for name in ("bash", "dirname"):
        (path / name).symlink_to(shutil.which(name))

    def put(file: Path, script: str) -> None:
        file.write_text("#!/bin/bash\n" + script)
        file.chmod(0o755)

    def ended() -> subprocess.CompletedProcess:
        command = [path / "bash", "scripts/run_tests.sh"]
        return subprocess.run(command, cwd=tmp_path, env={"PATH": str(path)}, capture_output=True, text=True)

    old = 'case $1 in -c) exit 1 ;; --version) echo "Python 3.10.12" ;; esac'  # has pip, and is not new enough
    put(path / "python3", old)
    assert ended().returncode == 2 and ended().stderr.startswith("error: found no python3 of 3.11")
    put(path / "python3.12", 'case "$*" in -c*) ;; *) echo made "$@"; exit 7 ;; esac')
    assert (ended().returncode, ended().stdout) == (7, "made -m venv .venv\n")
    put(environment / "python", old)
    assert ended().returncode == 2 and ended().stderr.startswith("error: .venv has Python 3.10.12, expected 3.11")
    without_venv = 'case "$*" in *ensurepip*) exit 1 ;; *install*) echo "$@"; exit 7 ;; esac'  # as virtualenv makes it
    put(environment / "python", without_venv)
    assert ended().returncode == 7 and ended().stdout.startswith("-m pip install --quiet -r requirements.txt")


def test_scripts_are_for_the_bash_of_macos_too():
    """3.2, where an empty array is an unset variable, with BSD's tools; no newer features."""
    newer = r"realpath -|readlink -f|sed -i|stat -c|nproc|mapfile|(declare|local) -[An]|\$\{\w+[,^]|wait -n|&>>"
    for script in (ROOT / "scripts").glob("*.sh"):
        code = re.sub(r"(?m)(^|\s)#.*|--nproc\S+", "", script.read_text())
        assert not re.findall(newer, code), script
        empty = set(re.findall(r"(\w+)=\(\)", code))
        bare = re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', code)
        assert not empty.intersection(bare), script


# --- what the run scripts hand on: a python that tells how it was called, and leaves an adapter

TELLS = """#!/bin/bash
echo "$@"
for ((i = 1; i <= $#; i++)); do
  if [ "${!i}" = --output_dir ]; then
    j=$((i + 1))
    mkdir -p "${!j}" && touch "${!j}/adapter_config.json"
  fi
done
"""


@pytest.fixture
def told(tmp_path):
    """told(command, variables): exit code, the calls of python by script, and errors."""
    python = tmp_path / "python"
    python.write_text(TELLS)
    python.chmod(0o755)

    def run(*command, **variables):
        kept = {"PATH": os.environ["PATH"], "PYTHON": str(python), "OUTPUTS": str(tmp_path / "outputs")}
        ended = subprocess.run(
            ["bash", *map(str, command)], cwd=ROOT, env=kept | variables, capture_output=True, text=True
        )
        calls = {line.split()[0]: line for line in ended.stdout.splitlines()}
        return ended.returncode, calls, ended.stderr

    return run


SAVES = f"""#!{sys.executable}
import pathlib, signal, sys, time

def save(number, frame):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(0 if pathlib.Path("last").exists() else 128 + number)

called = pathlib.Path(sys.argv[1]).name
if called in {[*SCRIPTS.values()]}:
    signal.signal(signal.SIGTERM, save)
    signal.signal(signal.SIGINT, save)
    pathlib.Path("started").touch()
    time.sleep(60)
pathlib.Path(called).touch()
"""


@pytest.mark.parametrize("script", ["run_rm.sh", "run_pipeline.sh"])
@pytest.mark.parametrize(
    ("number", "send", "at_its_end"),
    [
        (signal.SIGTERM, os.kill, False),
        (signal.SIGTERM, os.kill, True),
        (signal.SIGTERM, os.killpg, False),
        (signal.SIGINT, os.killpg, False),
    ],
    ids=["docker stop", "docker stop at the last step", "timeout", "Ctrl-C"],
)
def test_a_script_that_is_stopped_lets_its_stage_save(number, send, at_its_end, script, tmp_path):
    """And goes no further, though the stage was at its last step and ends well."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    python, data = tmp_path / "python", tmp_path / "data"
    python.write_text(SAVES)
    python.chmod(0o755)
    data.mkdir()
    if at_its_end:
        (tmp_path / "last").touch()
    kept = {"PATH": os.environ["PATH"], "PYTHON": str(python), "MODEL": "base"}
    kept |= dict.fromkeys(("PT_DATA", "SFT_DATA", "RM_DATA", "RL_DATA", "QUIZ", "GENERAL"), str(data))
    with subprocess.Popen(["bash", f"scripts/{script}"], cwd=tmp_path, env=kept, process_group=0) as started:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        send(started.pid, number)
        assert started.wait(20) == 128 + number
        assert (tmp_path / "saved").exists(), "it has waited"
    assert not (tmp_path / "merge_peft_adapter.py").exists() and not (tmp_path / "report.py").exists()


def test_a_run_script_follows_its_flags_and_variables(told, tmp_path):
    """Own records alone: a share is held out. The merge lies beside the output, and knows what remote code wants."""
    output = tmp_path / "mine"
    code, calls, _ = told("scripts/run_sft.sh", "--output_dir", output, "--trust_remote_code", TRAIN="mine/chat")
    assert code == 0
    assert "--train_file_dir mine/chat --validation_file_dir mine/chat" in calls["supervised_finetuning.py"]
    assert f"--trust_remote_code True --output_dir {output}-merged" in calls["merge_peft_adapter.py"]
    (tmp_path / "both" / "validation").mkdir(parents=True)
    for inside, train in (("", "both"), ("train", "both/train")):
        (tmp_path / "both" / inside).mkdir(exist_ok=True)
        _, calls, _ = told("scripts/run_sft.sh", TRAIN=f"{tmp_path}/both")
        folders = f"--train_file_dir {tmp_path}/{train} --validation_file_dir {tmp_path}/both/validation"
        assert folders in calls["supervised_finetuning.py"]
    _, calls, _ = told("scripts/run_sft.sh", TRAIN=f"{tmp_path}/both", VALIDATION="other")
    assert f"--train_file_dir {tmp_path}/both/train --validation_file_dir other" in calls["supervised_finetuning.py"]
    _, calls, _ = told("scripts/run_sft.sh", VALIDATION="other")
    assert "--train_file_dir data/finetune/train --validation_file_dir other" in calls["supervised_finetuning.py"]
    _, calls, _ = told("scripts/run_sft.sh", "--train_file_dir", "mine.jsonl")
    assert "--train_file_dir mine.jsonl --validation_file_dir mine.jsonl" in calls["supervised_finetuning.py"]
    _, calls, _ = told("scripts/run_sft.sh", "--dataset_name", "hub/data")
    assert "--train_file_dir  --validation_file_dir  --output_dir" in calls["supervised_finetuning.py"]
    _, calls, _ = told("scripts/run_sft.sh", "--train_file_dir=mine", "--validation-file-dir=other")
    assert "--train_file_dir mine --validation_file_dir other" in calls["supervised_finetuning.py"]
    _, calls, _ = told("scripts/run_sft.sh", OUTPUT=str(output), MERGED=f"{tmp_path}/elsewhere")
    assert "data/finetune/train --validation_file_dir data/finetune/validation" in calls["supervised_finetuning.py"]
    assert calls["merge_peft_adapter.py"].endswith(f"--output_dir {tmp_path}/elsewhere")


@pytest.mark.parametrize("flags", [("--plan",), ("--preview", 3), ("--preview=3",), ("--help",)])
def test_a_look_merges_nothing(flags, told, tmp_path):
    code, calls, _ = told("scripts/run_rm.sh", "--output_dir", tmp_path / "rm", *flags)
    assert code == 0 and list(calls) == ["reward_modeling.py"]


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--plan", "False"), False),
        (("--preview=0", "--trust_remote_code", "no"), False),
        (("--trust-remote-code", "0"), False),
        (("--trust_remote_code=FALSE",), False),
        (("--trust_remote_code",), True),
        (("--trust_remote_code", "--seed", 1), True),
        (("--trust_remote_code", "yes"), True),
    ],
)
def test_values_of_flags_mean_what_they_mean_in_python(flags, code, told, tmp_path):
    _, calls, _ = told("scripts/run_rm.sh", "--output_dir", tmp_path / "rm", *flags)
    assert f"--trust_remote_code {code} " in calls["merge_peft_adapter.py"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("True",), "True belongs to no flag"),
        (("--seed", "x"), "invalid int .*see python pretraining.py --help"),
        (("--sed", "1"), "no stage knows"),
    ],
)
def test_flags_of_all_stages_are_looked_at_before_anything_is_deleted(flags, said):
    with pytest.raises(UserError, match=said):
        check_flags([*flags])
    check_flags(["--seed", "1", "--fp16", "False", "--no_cuda"])


def test_the_pipeline_bounds_the_steps_of_the_sample_alone(told, tmp_path):
    mine = write_lines(tmp_path / "docs" / "train", [{"text": "a"}]).parent
    _, sample, _ = told("scripts/run_pipeline.sh", MODEL="base")
    _, own, _ = told("scripts/run_pipeline.sh", MODEL="base", PT_DATA=str(mine), RL_DATA=str(mine), ROLLOUTS="99")
    _, looked, _ = told("scripts/run_pipeline.sh", RL_DATA=str(mine))
    assert list(looked)[:2] == ["scripts/get_default_model.py", "scripts/check_inputs.py"]
    assert "--max_steps 26" in sample["pretraining.py"] and "--max_steps" not in own["pretraining.py"]
    assert f"--train_file_dir {mine}/train --validation_file_dir {mine}/train" in own["pretraining.py"]
    assert sample["rl_training.py"].endswith("--max_steps 12 --max_eval_samples 48")
    assert (
        own["rl_training.py"].endswith("--max_eval_samples 48 --max_steps 99")
        and "--max_steps 30" in own["supervised_finetuning.py"]
    )


def test_the_pipeline_misses_a_folder_at_once(told):
    code, calls, errors = told("scripts/run_pipeline.sh", MODEL="base", RM_DATA="mine/pairs", SFT_DATA="a:2,b")
    assert (code, calls) == (2, {}) and errors.startswith("error: there is no mine/pairs") and errors.count("\n") == 1


def test_the_pipeline_asks_first_whether_a_reward_model_can_be(told, tmp_path):
    MambaConfig().save_pretrained(tmp_path / "base")
    where = {"MODEL": f"{tmp_path}/base", "PYTHON": sys.executable}
    code, calls, errors = told("scripts/run_pipeline.sh", "--seed", 1, **where)
    assert (code, calls) == (2, {}) and "has no reward model" in errors and errors.count("\n") == 1
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("where", "record", "message"),
    [
        ("SFT_DATA", {"question": "q"}, "expected {messages}"),
        ("RM_DATA", {"prompt": "q", "chosen": "a"}, "rejected is empty"),
        ("RL_DATA", {"question": "q"}, "expected {prompt}"),
        ("QUIZ", {"question": "q", "options": {"A": "a"}, "answer": 0}, "[two texts or more]"),
    ],
)
def test_the_pipeline_reads_all_records_before_its_first_stage(where, record, message, told, tiny, tmp_path):
    mine, base = str(write_lines(tmp_path / "mine", [record])), str(tiny("llama"))
    code, calls, errors = told("scripts/run_pipeline.sh", **{"MODEL": base, "PYTHON": sys.executable, where: mine})
    assert (code, calls) == (2, {}) and f"{mine}/rows.jsonl:1: " in errors and message in errors
    assert not (tmp_path / "outputs").exists()


def test_the_pipeline_looks_at_nothing(told):
    code, calls, errors = told("scripts/run_pipeline.sh", "--plan")
    assert (code, calls) == (2, {}) and errors.startswith("error: --plan is for one stage") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        *((flag, "one by one") for flag in ("--deepspeed=scripts/zero2.json", "--fsdp", "--trust_remote_code")),
        *((flag, "set MODEL") for flag in ("--model_name_or_path", "--output-dir=x", "--train_file_dir")),
    ],
)
def test_the_pipeline_refuses_at_once_what_does_not_suit_all_stages(flag, advice, told):
    code, calls, errors = told("scripts/run_pipeline.sh", flag, "x")
    assert (code, calls) == (2, {}) and errors.startswith(f"error: {flag}") and advice in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--block_size", "write it into scripts/run_pt.sh"),
        ("--temperature=0.7", "write it into scripts/run_rl.sh"),
        ("--packing", "write it into scripts/run_sft.sh"),
        ("--lerning_rate", "no stage knows it"),
    ],
)
def test_the_pipeline_knows_before_its_first_stage_which_flags_a_later_one_does_not(flag, said, told, tiny):
    code, calls, errors = told("scripts/run_pipeline.sh", flag, 64, MODEL=str(tiny("llama")), PYTHON=sys.executable)
    assert (code, calls) == (2, {}) and said in errors and flag.partition("=")[0] in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("name", ["MODEL", "SFT_DATA", "GENERAL"])
def test_the_pipeline_deletes_nothing_that_it_is_to_read(name, told, tmp_path):
    """A second round from the model of a first one, into the same folder: stages that start over are deleted."""
    made = tmp_path / "outputs" / "sft-merged"
    made.mkdir(parents=True)
    code, calls, errors = told("scripts/run_pipeline.sh", "--fresh", **({"MODEL": "base"} | {name: str(made)}))
    assert (code, calls) == (2, {}) and f"error: {made} lies in" in errors and errors.count("\n") == 1
    assert made.exists()


def test_a_run_script_does_not_train_for_a_merge_into_its_base(told, tmp_path):
    (tmp_path / "sft-merged").mkdir()
    code, calls, errors = told("scripts/run_sft.sh", MODEL=f"{tmp_path}/sft-merged", OUTPUT=f"{tmp_path}/sft/")
    assert (code, calls) == (2, {}) and "set OUTPUT or MERGED" in errors and errors.count("\n") == 1
