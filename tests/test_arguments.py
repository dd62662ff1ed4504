"""The command line: old flags, typos, precision, splits, resuming, and what a run leaves behind."""

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT, history, in_process, stage
from loguru import logger
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MambaConfig,
    Qwen3MoeConfig,
    TrainerState,
    TrainingArguments,
)

import pretraining
import reward_modeling
import rl_training
import supervised_finetuning
from arguments.adapter import AdapterArguments
from arguments.base import adapter_folder, check_base, difference, facts_of, fingerprint, record_base
from arguments.checkpoints import CheckpointSeal
from arguments.command_line import (
    RENAMED_FLAGS,
    UserError,
    explained,
    first_line,
    modern_flags,
    parse_arguments,
    run_stage,
    without_secrets,
)
from arguments.curves import plot_curves
from arguments.data import DataArguments
from arguments.model import ModelArguments
from arguments.order import EpochSampler
from arguments.precision import best_precision, cpu_gain_by_bf16
from arguments.reward import RewardSourceArguments
from merge_peft_adapter import MergeArguments
from pretraining import PretrainingArguments
from reward_modeling import RewardArguments
from rl_training import PPOArguments
from supervised_finetuning import FinetuningArguments

GROUPS = ModelArguments, AdapterArguments, DataArguments, FinetuningArguments
STAGES = PretrainingArguments, FinetuningArguments, RewardArguments, PPOArguments
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture(autouse=True)
def no_traces(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))


@pytest.fixture
def required(tmp_path):
    return ["--model_name_or_path", "m", "--train_file_dir", "d", "--output_dir", str(tmp_path / "out")]


def parse(argv, groups=GROUPS):
    """All attributes of the parsed groups, the later groups' first."""
    return {k: v for group in parse_arguments(*groups, argv=argv) for k, v in vars(group).items()}


# flags


@pytest.mark.parametrize(
    ("flag", "nearest"),
    [
        ("--learning_rat", "did you mean --learning_rate"),
        ("--lora_rnk=4", "did you mean --lora_rank"),
        ("--train_file_dirr", "did you mean --train_file_dir"),
        ("--evaluation_strategyy", "did you mean --evaluation_strategy"),
        ("--warmup_ration", "did you mean --warmup_ratio"),
        (
            "--template-name=vicuna",
            "prompts use the tokenizer's own chat template",
        ),
        ("--qlora", "give --load_in_4bit"),
        ("--padding_side", "--help lists the flags"),  # not "did you mean --packing"
        ("--zzzzzzzz", "--help lists the flags"),
        ("stray", "--help lists the flags"),
    ],
)
def test_unknown_flags_name_the_nearest(required, flag, nearest):
    with pytest.raises(UserError, match=f"unknown argument {flag}: .*{nearest}"):
        parse([*required, flag])


RENAMED = {  # words after the flag: attribute and its value
    "--overwrite_output_dir": [([], "fresh", True), (["True"], "fresh", True), (["False"], "fresh", False)],
    "--warmup_ratio": [(["0.1"], "warmup_steps", 0.1)],
    "--evaluation_strategy": [(["steps"], "eval_strategy", "steps")],
    "--torch_dtype": [(["bfloat16"], "dtype", "bfloat16")],
    "--gradient_checkpointing": [
        ([], "activation_checkpointing", True),
        (["False"], "activation_checkpointing", False),
    ],
    "--gradient_checkpointing_kwargs": [
        (['{"use_reentrant": false}'], "activation_checkpointing_kwargs", {"use_reentrant": False})
    ],
    "--no_cuda": [([], "use_cpu", True)],
    "--per_gpu_train_batch_size": [(["3"], "per_device_train_batch_size", 3)],
    "--per_gpu_eval_batch_size": [(["3"], "per_device_eval_batch_size", 3)],
    "--log_with": [(["none"], "report_to", [])],
    "--save_safetensors": [([], "seed", 7), (["False"], "seed", 7)],  # dropped, and its value with it
    "--fp16_opt_level": [(["O1"], "seed", 7)],
    "--group_by_length": [([], "seed", 7), (["True"], "seed", 7), (["False"], "train_sampling_strategy", "random")],
    "--logging_dir": [(["logs"], "seed", 7)],
}


def test_every_renamed_flag_is_tested():
    assert set(RENAMED) == set(RENAMED_FLAGS)


@pytest.mark.parametrize("equals", [False, True])
@pytest.mark.parametrize(("flag", "words", "name", "value"), [(k, *row) for k in RENAMED for row in RENAMED[k]])
def test_renamed_flags_still_work(required, logged, flag, words, name, value, equals):
    flagged = ["=".join([flag, *words])] if equals else [flag, *words]
    assert parse([*required, "--activation_checkpointing", *flagged, "--seed", "7"])[name] == value
    assert sum(flag in line for line in logged if line.startswith("WARNING")) == 1


@pytest.mark.parametrize(("share", "steps", "warm"), [("0.05", 1, 0), ("0.05", 2, 1), ("4", 3, 2), ("4", 30, 4)])
def test_warm_up_leaves_a_step_to_learn_in(required, share, steps, warm):
    args = parse_arguments(*GROUPS, argv=[*required, "--warmup_steps", share])
    assert args[-1].get_warmup_steps(steps) == warm


def test_modern_flags_leaves_other_words_alone(logged):
    argv = ["--seed", "-1", "--save_safetensors", "False", "--fresh", "--lr=--no_cuda", "x"]
    assert modern_flags(argv) == ["--seed", "-1", "--fresh", "--lr=--no_cuda", "x"]
    assert len(logged) == 1


def test_tokens_are_masked_in_every_spelling():
    given = ["--hub_token", "a", "--hub-token=b", "--push-to-hub-token", "c", "--max_new_tokens", "4", "--hub_token"]
    masked = ["--hub_token", "...", "--hub-token=...", "--push-to-hub-token", "...", *given[5:]]
    assert without_secrets(given) == masked


@pytest.mark.parametrize("missing", ["--model_name_or_path", "--train_file_dir", "--output_dir"])
def test_missing_required_flags(required, missing):
    at = required.index(missing)
    with pytest.raises(UserError, match=f"{missing} is missing"):
        parse(required[:at] + required[at + 2 :])


@pytest.mark.parametrize(
    ("groups", "argv", "message"),
    [
        (RewardSourceArguments, [], "--reward_model_name_or_path is missing"),
        (
            RewardSourceArguments,
            ["--reward_model_name_or_path", "r", "--reward_weights", "1,2"],
            "--reward_weights holds 2 numbers for 1 sources: model",
        ),
        (MergeArguments, ["--output_dir", "o"], "--peft_model_path is missing"),
        (MergeArguments, ["--peft_model_path", "p"], "--output_dir is missing"),
        (AdapterArguments, ["--lora_rank", "0"], "--lora_rank is 0, expected at least 1"),
        (AdapterArguments, ["--lora_dropout", "1"], r"--lora_dropout is 1.0, expected a share in \[0, 1\)"),
        (AdapterArguments, ["--lora_alpha", "0"], "--lora_alpha is 0.0, expected a finite number above 0"),
        (AdapterArguments, ["--lora_alpha", "nan"], "--lora_alpha is nan, expected a finite number above 0"),
        (AdapterArguments, ["--lora_rank", "four"], "--lora_rank.*: invalid int value: 'four'"),
        (AdapterArguments, ["--lora_rank"], "--lora_rank.*: expected one argument"),
        (
            DataArguments,
            ["--train_file_dir", "d", "--dataset_name", "n"],
            "d and --dataset_name n are two sources: give one",
        ),
        (DataArguments, ["--train_file_dir", "d", "--max_source_length", "0"], "--max_source_length is 0"),
        (DataArguments, ["--train_file_dir", "d", "--max_target_length", "-1"], "--max_target_length is -1"),
        (DataArguments, ["--train_file_dir", "d", "--bad_records", "drop"], "--bad_records.*: invalid choice: 'drop'"),
        (
            RewardArguments,
            ["--output_dir", "o", "--max_length", "512"],
            "--max_length is 512.*give --max_source_length",
        ),
        (PretrainingArguments, ["--output_dir", "o", "--block_size", "1"], "--block_size is 1, expected at least 2"),
        (PretrainingArguments, ["--output_dir", "o", "--streaming"], "--streaming .*set --max_steps"),
        (
            PPOArguments,
            ["--output_dir", "o", "--mini_batch_size", "3"],
            "--batch_size 8 is not a multiple of --mini_batch_size 3",
        ),
        (
            PPOArguments,
            ["--output_dir", "o", "--load_best_model_at_end", "--eval_steps", "2", "--save_steps", "3"],
            "--save_steps 3 is not a multiple of --eval_steps 2",
        ),
        (
            PretrainingArguments,
            ["--output_dir", "o", "--resume_from_checkpoint", "True", "--overwrite_output_dir"],
            "deletes them all: leave one",
        ),
        (
            PPOArguments,
            ["--output_dir", "o", "--ppo_epochs", "0"],
            "--ppo_epochs is 0, expected at least 1",
        ),
        (FinetuningArguments, ["--output_dir", "o", "--eval_strategy", "sometimes"], "sometimes"),
    ],
)
def test_refused_values(groups, argv, message):
    with pytest.raises(UserError, match=message):
        parse(argv, [groups])


def test_run_stage_ends_with_one_line_and_code_2(capsys):
    def main():
        raise UserError("no such thing")

    with pytest.raises(SystemExit) as exit_:
        run_stage(main)
    logger.remove()  # run_stage logs to this test's stderr
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: no such thing\n"


def test_run_stage_leaves_the_other_processes(tmp_path):
    """Python would abort if a thread of the group still held tensors when it ends."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    run_stage(lambda: dist.all_reduce(torch.ones(1)))
    assert not dist.is_initialized()


def test_run_stage_says_ctrl_c_in_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit_:
        run_stage(main)
    assert exit_.value.code == 130 and capsys.readouterr().err.split("\n") == ["", "stopped by Ctrl-C", ""]


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_cannot_be_read_is_bad_input(wrapped, tmp_path, monkeypatch):
    """Also inside the error that datasets makes of it; tests may run as root, who may read all."""
    touch(tmp_path, "rows.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode, **kwargs: False)

    def said(name):
        error = inner = PermissionError(13, "Permission denied", str(tmp_path / name))
        if wrapped:
            error = RuntimeError("Permission denied, said the library")
            error.__cause__ = inner
        return explained(error)

    assert said("rows.jsonl").code == 2 and "rows.jsonl cannot be read" in str(said("rows.jsonl"))
    assert said("new").code == 1 and "cannot write" in str(said("new"))
    assert "training goes on from its last whole checkpoint, anything else starts over" in str(said("new"))


def test_a_reader_that_has_seen_enough_is_no_traceback(tmp_path):
    code = "from arguments.command_line import run_stage as run; run(lambda: [print('x' * 9999) for _ in range(99)])"
    command = f'{sys.executable} -c "{code}" | head -c 5; echo ${{PIPESTATUS[0]}}'
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("xxxxx141\n", "")


@pytest.mark.parametrize("error", [Exception, OSError, RuntimeError])
def test_a_full_disk_is_said_whoever_says_it(error):
    assert explained(error("No space left on device (os error 28)")).code == 1


def test_eval_steps_evaluate(required):
    assert parse([*required, "--eval_steps", "5"])["eval_strategy"] == "steps"
    assert parse([*required, "--eval_steps", "5", "--do_eval", "False"])["eval_strategy"] == "no"


@pytest.mark.parametrize(("offline", "why"), [(False, "refused"), (True, "offline mode is enabled")])
def test_a_hub_out_of_reach_is_no_traceback(offline, why, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(Exception, match=why) as failed:
        huggingface_hub.get_session().get("http://127.0.0.1:9")  # nothing listens there
    said = explained(failed.value)
    assert said.code == 1 and "a server cannot be reached" in str(said) and why in str(said)
    assert explained(ImportError("cannot import name 'a' from 'b'")) is None


EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "flags", "said"),
    [
        (MambaConfig, {}, "All but those: --target_modules dt_proj,in_proj,x_proj"),
        (Qwen3MoeConfig, EXPERTS, "--lora_dropout 0.1 does not go with this model's experts"),
    ],
)
def test_what_peft_refuses_is_said_of_the_flag_that_helps(config, flags, said):
    """It names the last module in Mamba, and the targets of a mixture, whose experts take no dropout."""
    small = config(vocab_size=400, hidden_size=32, num_hidden_layers=1, **flags)
    model, dropout = AutoModelForCausalLM.from_config(small), 0.1 if flags else 0.0
    with pytest.raises(UserError) as refused:
        AdapterArguments(lora_dropout=dropout).apply(copy.deepcopy(model), "CAUSAL_LM")
    assert str(refused.value).startswith(said) or str(refused.value).endswith(said)
    targets = said.rpartition(" ")[2] if not flags else "all"
    AdapterArguments(target_modules=targets).apply(model, "CAUSAL_LM")


BEST = ["--save_strategy", "best", "--eval_steps", "5", "--metric_for_best_model"]


@pytest.mark.parametrize(
    ("stage", "metric", "more"),
    [
        (PretrainingArguments, "perplexity", False),
        (FinetuningArguments, "eval_perplexity", False),
        (FinetuningArguments, "loss", False),
        (RewardArguments, "loss", False),
        (RewardArguments, "accuracy", True),
        (RewardArguments, "eval_accuracy_too_short", True),
        (PPOArguments, "reward", True),
    ],
)
def test_the_best_checkpoint_is_the_best_one(tmp_path, stage, metric, more):
    argv = ["--output_dir", str(tmp_path), *BEST, metric]
    assert parse(argv, [stage])["greater_is_better"] is more
    assert parse([*argv, "--greater_is_better", str(not more)], [stage])["greater_is_better"] is not more


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--length_column_name", "tokens"], "--length_column_name"),
        (["--do_predict"], "--do_predict has no effect: inference.py"),
        (["--include_for_metrics", "inputs"], "--include_for_metrics"),
        (["--batch_eval_metrics"], "--batch_eval_metrics"),
        (["--optim_args", "rank=4"], "--optim_args has no effect: --optim adamw_torch"),
        (["--optim_target_modules", "all-linear"], "--optim_target_modules"),
        (["--optim", "sgd", "--optim_args", "momentun=0.9"], "--optim_args has no effect: --optim sgd"),
        (["--optim", "sgd", "--optim_args", "momentum=0.9"], None),
        (["--length_column_name", "length"], None),
        ([], None),
    ],
)
def test_flags_without_effect_are_said(required, logged, argv, said):
    parse([*required, *argv])
    found = [line for line in logged if "has no effect" in line]
    assert len(found) == (said is not None) and all(f"WARNING: {said}" in line for line in found)


def test_an_optimizer_with_targets_reads_them(required, logged, monkeypatch):
    """The package of GaLore is not installed; without targets transformers refuses it."""

    def made(args, model):
        if args.optim_target_modules is None:
            raise ValueError("You need to define `optim_target_modules`")
        return torch.optim.SGD, {"rank": args.optim_args}

    monkeypatch.setattr("arguments.flags.Trainer.get_optimizer_cls_and_kwargs", made)
    parse([*required, "--optim_target_modules", "all-linear", "--optim_args", "rank=4"])
    assert not [line for line in logged if "has no effect" in line]


def test_an_accelerator_config_is_read(required, tmp_path):
    (tmp_path / "config.json").write_text('{"even_batches": false}')
    for asked in ('{"even_batches": false}', str(tmp_path / "config.json")):
        assert parse([*required, "--accelerator_config", asked])["accelerator_config"].even_batches is False


def test_lora_flags_without_effect_are_named(tiny, tmp_path, logged):
    def said(**flags) -> list[str]:
        logged.clear()
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
        AdapterArguments(**flags).apply(model, "CAUSAL_LM").save_pretrained(tmp_path)
        return [line.removeprefix("WARNING: ") for line in logged if "without effect" in line]

    assert said(use_peft=False) == []
    assert said(use_peft=False, lora_rank=4) == ["--lora_rank without effect: --use_peft False"]
    kept = {"lora_rank": 4, "target_modules": "v_proj,q_proj", "modules_to_save": "lm_head"}
    assert said(**kept) == said(**kept, peft_path=str(tmp_path)) == []
    others = {"lora_rank": 64, "lora_alpha": 99.0, "lora_dropout": 0.5, "target_modules": "q_proj"}
    flags = "--target_modules, --lora_rank, --lora_alpha, --lora_dropout"
    why = f"the adapter of --peft_path {tmp_path} keeps its own"
    assert said(**others, peft_path=str(tmp_path)) == [f"{flags} without effect: {why}"]


def test_a_base_that_no_reward_model_can_be_made_of_is_told_from_a_broken_one(tmp_path):
    model_args = ModelArguments(str(tmp_path), dtype="float32")
    Qwen3MoeConfig().save_pretrained(tmp_path)
    model_args.check_scores()
    MambaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no reward model .*ForSequenceClassification.* for mamba. Train"):
        model_args.load_model(AutoModelForSequenceClassification, num_labels=1)


def test_ppo_steps_are_rollouts(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--max_steps", "5", "--save_steps", "2"]
    args = parse([*argv, "--batch_size", "6", "--mini_batch_size", "3", "--ppo_epochs", "4"], [PPOArguments])
    assert (args["rollouts"], args["max_steps"], args["save_steps"], args["logging_steps"]) == (5, 40, 16, 8)


# precision


@needs_no_gpu
@pytest.mark.parametrize("flags", [["--fp16"], ["--precision", "fp16"], ["--precision=auto"], []])
def test_without_gpu_fp16_falls_back(required, logged, flags):
    args = parse([*required, *flags])
    best = best_precision(gpu=False)
    assert (args["precision"], args["fp16"], args["bf16"]) == (best, False, best == "bf16")
    assert any("fp16 needs a GPU" in line for line in logged) == any("fp16" in flag for flag in flags)
    assert args["use_cpu"] is True


@needs_no_gpu
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("flags", "precision"),
    [(["--precision", "fp32"], "fp32"), (["--precision", "bf16"], "bf16"), (["--bf16", "True"], "bf16")],
)
def test_precision_is_as_asked_in_every_stage(tmp_path, stage, flags, precision):
    args = parse(["--output_dir", str(tmp_path), *flags], [stage])
    assert (args["precision"], args["fp16"], args["bf16"]) == (precision, False, precision == "bf16")


@pytest.mark.parametrize(("cpu", "expected"), [("fp32", "fp32"), ("bf16", "bf16")])
def test_use_cpu_beside_a_gpu(cpu, expected, required, monkeypatch, logged):
    """A T4, which would take fp16: accelerate has neither autocast nor a scaler for it on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("arguments.precision.native_bf16", lambda gpu: not gpu and cpu == "bf16")
    monkeypatch.setattr("arguments.precision.cpu_gain_by_bf16", lambda: 2.1)
    for flags in ([], ["--fp16"]):
        args = parse([*required, "--no_cuda", *flags])
        assert (args["precision"], args["fp16"], args["use_cpu"]) == (expected, False, True)
    assert any("Device CPU" in line for line in logged)


@pytest.mark.parametrize(
    ("native", "times", "precision"), [(True, 2.1, "bf16"), (True, 0.53, "fp32"), (False, 2.1, "fp32")]
)
def test_a_cpu_takes_bf16_if_it_is_faster_so(native, times, precision, monkeypatch):
    """Intel's with avx512_bf16 but without AMX take twice as long as in float32; no CPU emulates it faster."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("arguments.precision.cpu_gain_by_bf16", lambda: times)
    assert best_precision(gpu=False) == precision
    assert best_precision(gpu=False, sampling=True) == ("bf16" if native else "fp32")


def test_the_gain_by_bf16_is_the_ratio_of_the_shortest_times(monkeypatch):
    """Of five turns of float32, bfloat16, by a clock that some turns hold up."""
    spent = [9, 7, 4, 2, 6, 3, 4.5, 2.5, 5, 9]
    clock = iter([time for number, turn in enumerate(spent) for time in (100 * number, 100 * number + turn)])
    monkeypatch.setattr("arguments.precision.time.thread_time", lambda: next(clock))
    before = torch.get_num_threads()
    torch.set_num_threads(threads := before + 1)
    assert cpu_gain_by_bf16.__wrapped__() == 2
    assert torch.get_num_threads() == threads and next(clock, None) is None
    torch.set_num_threads(before)


@pytest.mark.parametrize(("flags", "expected"), [(["--bf16"], True), (["--bf16", "False"], False)])
def test_bf16_as_transformers_has_it(required, monkeypatch, flags, expected):
    monkeypatch.setattr("arguments.precision.native_bf16", lambda gpu: True)
    assert parse([*required, *flags])["bf16"] is expected


@needs_no_gpu
@pytest.mark.parametrize(
    ("flag", "precision", "trains_all", "expected"),
    [
        ("auto", "bf16", False, torch.bfloat16),
        (None, "fp32", False, torch.float32),
        (None, "bf16", True, torch.float32),
        ("float32", "bf16", False, torch.float32),
        ("bfloat16", "fp32", True, torch.bfloat16),
        ("float16", "fp32", False, torch.float32),  # which needs a GPU
        ("auto", "fp16", False, torch.float32),
    ],
)
def test_frozen_weights_follow_the_precision(flag, precision, trains_all, expected):
    args = ModelArguments(model_name_or_path="m", dtype=flag)
    args.resolve_dtype(precision, trains_all)
    assert args.torch_dtype() == expected


@pytest.mark.parametrize(("rank", "placed"), [(None, "auto"), ("0", None)])
def test_a_model_is_spread_by_one_process_alone(rank, placed, monkeypatch, logged):
    """Of several each has a GPU of its own; accelerate trains no model that was spread under torchrun, even of one."""
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ModelArguments(model_name_or_path="m", device_map="auto")._placement() == placed
    assert any("--device_map auto has no effect" in line for line in logged) == (placed is None)


def test_an_adapter_is_found_where_a_merge_in_place_puts_it(tmp_path):
    path = str(tmp_path)
    assert adapter_folder(path) is None and AdapterArguments(peft_path=path).adapter_path == path  # or a hub name
    for folder in (tmp_path / "adapter", tmp_path):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").touch()
        assert adapter_folder(path) == folder and AdapterArguments(peft_path=path).adapter_path == str(folder)


# splits


def held_out(folder, rows, share, **kwargs):
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(rows)))
    train, held = DataArguments(str(folder), validation_split_percentage=share, **kwargs).load_documents()
    assert not set(train["text"]) & set(held["text"])
    return len(train), sorted(held["text"])


def test_split_percentage_and_fraction_mean_the_same(tmp_path):
    train, fifth = held_out(tmp_path, 100, 5)
    assert (train, len(fifth)) == (95, 5)
    assert held_out(tmp_path, 100, 0.05) == (95, fifth)


@pytest.mark.parametrize(("rows", "share", "count"), [(100, 1, 1), (200, 1, 2), (10, 0.5, 5), (10, 50, 5), (3, 5, 1)])
def test_split_sizes(tmp_path, rows, share, count):
    train, held = held_out(tmp_path, rows, share)
    assert (train, len(held)) == (rows - count, count)


def test_sample_limits(tmp_path):
    train, held = held_out(tmp_path, 100, 10, max_train_samples=7, max_eval_samples=2)
    assert (train, len(held)) == (7, 2)


def test_one_record_cannot_be_split(tmp_path):
    with pytest.raises(UserError, match="1 held-out records asked for, but there are 1 in all"):
        held_out(tmp_path, 1, 5)


# the order of rows


def order(folder, epoch, lengths=None, **kwargs):
    trainer = SimpleNamespace(args=run_arguments(folder, **kwargs), state=TrainerState(epoch=epoch))
    return list(EpochSampler(trainer, 40, lengths))


@pytest.mark.parametrize("lengths", [None, list(range(40))])
def test_each_epoch_has_an_order_of_its_own(lengths, tmp_path):
    first, second = order(tmp_path, 0, lengths), order(tmp_path, 1.0, lengths)
    assert sorted(first) == sorted(second) == list(range(40)) and first != second
    assert order(tmp_path, 1.0, lengths) == order(tmp_path, 1.5, lengths) == second
    assert order(tmp_path, 0, lengths, seed=7) != first


def test_data_seed_is_that_of_the_order(tmp_path):
    third = order(tmp_path, 0, seed=3)
    assert order(tmp_path, 0, seed=1, data_seed=3) == order(tmp_path, 0, seed=2, data_seed=3) == third
    assert order(tmp_path, 0, seed=3, data_seed=0) != third


@pytest.mark.parametrize("more", [(), ("--streaming",)])
def test_documents_too_come_in_the_order_of_the_data_seed(more, tiny, records, tmp_path):
    found = []
    for seed, data_seed in ((1, 3), (3, 3), (3, 1)):
        flags = "--fresh", "--max_steps", 1, "--seed", seed, "--data_seed", data_seed, "--do_eval", "False"
        in_process(*stage("pt", tiny("llama"), records, tmp_path, *flags, *more)).ok()
        found += history(tmp_path, "loss")
    assert found[0] == found[1] != found[2]  # an adapter begins as nothing, whatever the seed


@pytest.mark.parametrize(
    ("name", "script", "more"),
    [
        ("pt", pretraining, ()),
        ("pt", pretraining, ("--streaming", "--max_steps", 1)),
        ("sft", supervised_finetuning, ()),
        ("rm", reward_modeling, ()),
        ("rl", rl_training, ("--reward_functions", "rewards.py:none")),
    ],
)
def test_workers_can_be_spawned(name, script, more, tiny, records, tmp_path, monkeypatch):
    """As macOS does: what a DataLoader hands to its processes is pickled."""

    def make(**kwargs):
        raise StopIteration(pickle.loads(pickle.dumps([kwargs["data_collator"], kwargs["train_dataset"]])))

    (trainer,) = [one for one in vars(script) if one.endswith("Trainer") and one not in ("Trainer", "RewardTrainer")]
    monkeypatch.setattr(script, trainer, make)
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text("def none(completions, **columns): return [0.0] * len(completions)")
    monkeypatch.setattr(sys, "argv", list(map(str, stage(name, tiny("llama"), records, tmp_path / "out", *more))))
    with pytest.raises(StopIteration):
        script.main()


# going on, starting over


def run_arguments(folder, **kwargs):
    return FinetuningArguments(output_dir=str(folder), **kwargs)


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def save_checkpoints(folder, *steps, best=None, **kwargs):
    for step in steps:
        touch(folder, f"checkpoint-{step}/x")
        state = TrainerState(global_step=step, is_world_process_zero=True, best_model_checkpoint=best)
        CheckpointSeal().on_save(run_arguments(folder, **kwargs), state, None)


def left(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_saved_twice_is_whole(tmp_path):
    """By its step and by an evaluation that found it the best: the first seal is none of its files."""
    save_checkpoints(tmp_path, 10, 10)
    assert run_arguments(tmp_path).checkpoint("base") == str(tmp_path / "checkpoint-10")


def test_checkpoint_is_the_newest_by_number(tmp_path, logged):
    assert run_arguments(tmp_path / "nowhere").checkpoint("base") is None
    assert run_arguments(tmp_path).checkpoint("base") is None
    save_checkpoints(tmp_path, 9, 10)
    assert run_arguments(tmp_path).checkpoint("base") == str(tmp_path / "checkpoint-10")
    assert any("--fresh starts over" in line for line in logged)


def test_checkpoint_is_whole(tmp_path, logged):
    save_checkpoints(tmp_path, 8, 9, 10, save_total_limit=3)
    touch(tmp_path, "checkpoint-11/x")  # killed before the seal
    (tmp_path / "checkpoint-10" / "x").unlink()
    (tmp_path / "checkpoint-9" / "x").write_text("half")
    assert run_arguments(tmp_path).checkpoint("base") == str(tmp_path / "checkpoint-8")
    faults = [line for line in logged if "Not going on from" in line]
    assert len(faults) == 3 and "checkpoint-11: its saving was interrupted" in faults[0]
    assert all("changed since it was saved: x" in fault for fault in faults[1:])


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (2, None, [9, 10]),
        (1, None, [10]),
        (2, 7, [7, 10]),
        (1, 7, [7, 10]),
        (6, None, [7, 8, 9, 10]),
        (None, None, [3, 5, 7, 8, 9, 10]),
    ],
)
def test_old_checkpoints_go_when_the_new_one_is_whole(tmp_path, limit, best, kept):
    save_checkpoints(tmp_path, 7, 8, 9, save_total_limit=9)
    touch(tmp_path, "checkpoint-3/x", "checkpoint-5/x")  # killed before their seals: they count for nothing
    best = best and str(tmp_path / f"checkpoint-{best}")
    save_checkpoints(tmp_path, 10, save_total_limit=limit, best=best)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")) == kept


def test_a_checkpoint_damaged_since_does_not_count(tmp_path):
    save_checkpoints(tmp_path, 7, 8)
    (tmp_path / "checkpoint-8" / "x").write_text("cut")
    save_checkpoints(tmp_path, 9)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-7", "checkpoint-9"]


def test_checkpoint_asked_for_wins(tmp_path, logged):
    save_checkpoints(tmp_path, 8, 9, save_total_limit=9)
    before, asked = left(tmp_path), str(tmp_path / "checkpoint-9")
    save_checkpoints(tmp_path, 10, save_total_limit=9)
    assert run_arguments(tmp_path, resume_from_checkpoint=asked, fresh=True).checkpoint("base") == asked
    assert left(tmp_path) == before, "without the flag, the run would go on from a later one"
    assert any("Removing" in line and "checkpoint-10" in line for line in logged)
    elsewhere = run_arguments(tmp_path / "elsewhere", resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert elsewhere.checkpoint("base") == str(tmp_path / "checkpoint-8") and left(tmp_path) == before


def test_checkpoint_asked_for_is_looked_at_as_any_other(tmp_path, tiny):
    save_checkpoints(tmp_path, 9, 10)
    (tmp_path / "checkpoint-9" / "x").write_text("half")
    asked = {"resume_from_checkpoint": str(tmp_path / "checkpoint-9")}
    with pytest.raises(UserError, match="checkpoint-9: changed since it was saved: x. Name another"):
        run_arguments(tmp_path, **asked).checkpoint("base")
    asked = {"resume_from_checkpoint": str(tmp_path / "checkpoint-10")}
    with pytest.raises(UserError, match="checkpoints of another stage .FinetuningArguments."):
        PretrainingArguments(output_dir=str(tmp_path), **asked).checkpoint("base")
    record_base(tmp_path / "checkpoint-10", facts_of(tiny("qwen3")))
    with pytest.raises(UserError, match="was not trained on .*: it is a llama, the training was on a qwen3"):
        run_arguments(tmp_path, **asked).checkpoint(tiny("llama"))


def test_checkpoint_asked_for_by_no_name_is_the_newest(tmp_path):
    assert run_arguments(tmp_path, resume_from_checkpoint="True").checkpoint("base") is None
    save_checkpoints(tmp_path, 9, 10)
    found = run_arguments(tmp_path, resume_from_checkpoint="True").checkpoint("base")
    assert found == str(tmp_path / "checkpoint-10")


def test_no_checkpoint_asked_for_starts_over(tmp_path):
    save_checkpoints(tmp_path, 9, 10)
    assert run_arguments(tmp_path, resume_from_checkpoint="False").checkpoint("base") is None
    assert left(tmp_path) == []


def test_gradient_accumulation_is_no_flag_of_ppo(tmp_path, logged):
    run = PPOArguments(output_dir=str(tmp_path), gradient_accumulation_steps=4)
    assert run.gradient_accumulation_steps == 1
    assert any("--gradient_accumulation_steps has no effect in RL" in line for line in logged)


def test_several_gpus_in_one_process_are_one(tmp_path, monkeypatch, logged):
    """transformers would wrap the model in DataParallel."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    run = run_arguments(tmp_path)
    assert run._n_gpu == 1 and any("4 GPUs and one process" in line for line in logged)
    assert run.optim == "adamw_torch_fused"


def test_no_fused_optimizer_where_a_model_may_be_spread_in_fp16(tmp_path, monkeypatch):
    """It takes an overflow on two GPUs for none. The same kernel on a CPU: 0 passes, 1 skips, and 2 writes NaN."""
    weight = torch.ones(3)
    weight.grad = torch.full((3,), math.inf)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert weight.tolist() == [1, 1, 1]
    optimizer.found_inf = torch.tensor(2.0)
    optimizer.step()
    assert weight.isnan().all(), "torch skips such a step now: run.py need not choose another optimizer"

    # fp16 as four T4 choose it: without a GPU transformers would refuse it before the GPUs are counted
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: vars(self).update(fp16=True) or 4))
    assert run_arguments(tmp_path).optim == "adamw_torch"
    assert run_arguments(tmp_path, optim="sgd").optim == "sgd"


@pytest.mark.parametrize("name", ["checkpoint-11", "checkpoint-9/x"])
def test_checkpoint_asked_for_is_a_folder(tmp_path, name):
    touch(tmp_path, "checkpoint-9/x")
    with pytest.raises(UserError, match=f"--resume_from_checkpoint .*{name} is not a folder"):
        run_arguments(tmp_path, resume_from_checkpoint=str(tmp_path / name), fresh=True).checkpoint("base")
    assert left(tmp_path) == ["checkpoint-9/x"]


def test_fresh_removes_what_a_run_left(tmp_path):
    weights = ("adapter_config.json", "config.json", "model.safetensors")
    touch(tmp_path, *weights, "notes.txt", "adapter_of_mine/x")
    run_arguments(tmp_path, fresh=True).checkpoint("base")
    assert left(tmp_path) == sorted([*weights, "adapter_of_mine/x", "notes.txt"])  # no run of ours left these
    touch(tmp_path, "checkpoint-9/x", "checkpoint-10/x", "train_results.json")
    (tmp_path / "run.json").write_text('{"script": "another_stage.py"}')
    with pytest.raises(UserError, match="holds what another_stage.py made: .* --fresh"):
        run_arguments(tmp_path)
    assert run_arguments(tmp_path, fresh=True).checkpoint("base", adapter=str(tmp_path)) is None
    assert left(tmp_path) == sorted([*weights, "adapter_of_mine/x", "notes.txt"])  # what the run starts from stays
    touch(tmp_path, "checkpoint-9/x")
    assert run_arguments(tmp_path, fresh=True).checkpoint("base") is None
    assert left(tmp_path) == ["adapter_of_mine/x", "notes.txt"]
    run_arguments(tmp_path)  # killed, that run may go on without --fresh


def test_merged_output_needs_fresh(tmp_path):
    merged = ["merge.json", "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "adapter/x"]
    touch(tmp_path, *merged, "model.safetensors.index.json", "checkpoint-3/x", "all_results.json")
    with pytest.raises(UserError, match="already holds a merged model: --fresh"):
        run_arguments(tmp_path)
    assert run_arguments(tmp_path, resume_from_checkpoint="False").fresh
    assert "model.safetensors" in left(tmp_path)
    assert run_arguments(tmp_path, fresh=True).checkpoint("base") is None
    assert left(tmp_path) == []


def test_plot_curves(tmp_path):
    history = [
        {"step": 0, "eval_loss": 3.0, "eval_runtime": 1.0, "eval_rewards/margin": 0.1, "epoch": 0},
        {"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": None, "epoch": 0.5},
        {"step": 2, "loss": 1.0, "learning_rate": 0.2, "grad_norm": 1.0, "epoch": 1.0},
        {"step": 2, "eval_loss": 1.5, "eval_runtime": 1.0, "eval_rewards/margin": 0.2, "eval_pairs": 1, "epoch": 1.0},
        {"step": 2, "train_loss": 1.5, "train_runtime": 9.0, "total_flos": 1e9, "epoch": 1.0},
    ]
    plot_curves(history, tmp_path)
    assert left(tmp_path) == ["training_learning_rate.png", "training_loss.png", "training_rewards_margin.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in left(tmp_path))


@pytest.mark.parametrize("stage", STAGES)
def test_help_can_be_printed(stage, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py", "--help"])  # a bare % in a help text breaks argparse
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "Stage 2.\n\n    python stage.py --flag\n")
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(ModelArguments, AdapterArguments, DataArguments, stage)
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: stage.py [flags]\n\nStage 2.\n\n    python stage.py --flag\n")
    assert "--validation_split_percentage" in printed and "(default: 42)" in printed


# The flags of the 2023 scripts, with values that those passed.
TRAINERS = """--model_type auto --model_name_or_path m --tokenizer_name_or_path t --load_in_8bit False
    --cache_dir ./cache --use_fast_tokenizer True --torch_dtype float16 --device_map auto --trust_remote_code True
    --train_file_dir d --validation_file_dir v --max_train_samples 10 --max_eval_samples 10 --seed 42
    --overwrite_cache False --validation_split_percentage 5 --preprocessing_num_workers 4
    --use_peft True --target_modules q_proj,v_proj
    --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --modules_to_save embed_tokens --peft_path a --output_dir o
    --do_train --do_eval --report_to tensorboard --gradient_checkpointing True --gradient_accumulation_steps 1"""
SCHEDULE = """--fp16 --num_train_epochs 1 --learning_rate 2e-4 --warmup_ratio 0.05 --weight_decay 0.01
    --logging_strategy steps --logging_steps 10 --eval_steps 50 --evaluation_strategy steps --save_steps 500
    --save_strategy steps --save_total_limit 3 --overwrite_output_dir --logging_first_step True --ddp_timeout 30000
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --ddp_find_unused_parameters False"""
LENGTHS = "--max_source_length 256 --max_target_length 256"
RL = """--reward_model_name_or_path r --batch_size 8 --mini_batch_size 4 --min_target_length 4 --early_stopping True
    --target_kl 0.1 --reward_baseline 0.0 --init_kl_coef 0.2 --adap_kl_ctrl True --learning_rate 1e-5 --save_steps 50
    --max_steps 100 --log_with tensorboard"""
OF_2023 = {
    PretrainingArguments: f"{TRAINERS} {SCHEDULE} --streaming False --block_size 1024 --keep_linebreaks True",
    FinetuningArguments: f"{TRAINERS} {SCHEDULE} {LENGTHS}",
    RewardArguments: f"{TRAINERS} {SCHEDULE} {LENGTHS}",
    PPOArguments: f"{TRAINERS} {LENGTHS} {RL}",
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_of_2023_is_known(stage, tmp_path, logged):
    groups = [ModelArguments, AdapterArguments, DataArguments, stage]
    groups += [RewardSourceArguments] if stage is PPOArguments else []
    words = OF_2023[stage].replace("--output_dir o", f"--output_dir {tmp_path / 'out'}").split()
    found = parse(words, groups)
    assert found["lora_dropout"] == 0.05 and found["target_modules"] == "q_proj,v_proj" and found["seed"] == 42
    warned = [line for line in logged if "is the old name of" in line or "has no effect any more" in line]
    assert len(warned) == sum(flag in RENAMED_FLAGS for flag in words) > 0
    hub = ["--model_name_or_path", "m", "--dataset_name", "n", "--dataset_config_name", "c", "--output_dir", "o"]
    assert parse([*hub, *(["--reward_model_name_or_path", "r"] if stage is PPOArguments else [])], groups)


# --- which base an adapter belongs to


def test_fingerprint_tells_bases_apart(tiny, tmp_path):
    """Shards, file format and a coarser dtype leave it the same; one changed layer does not."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    known = fingerprint(tiny("llama"))
    assert len(known["weights"]) == 16 and known["model_type"] == "llama"  # two layers of 7, embeddings, head
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for name in ("shards", "bf16", "bin"):
        assert difference(known, fingerprint(str(tmp_path / name))) is None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1.1
    model.save_pretrained(tmp_path / "changed")
    assert "1 of 16 weights" in difference(known, fingerprint(str(tmp_path / "changed")))
    assert "it is a qwen3" in difference(known, fingerprint(tiny("qwen3")))
    assert fingerprint(str(tmp_path / "none")) == {} and difference(known, {}) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 9.0}, "rope_theta is 9.0, was 10000.0"),
        ({"rms_norm_eps": 0.1, "num_attention_heads": 2}, "num_attention_heads is 2, was 4, rms_norm_eps is 0.1"),
        ({"rms_norm_eps": 9.999999974752427e-07}, None),
        ({"use_cache": False, "dtype": "bfloat16", "eos_token_id": 9, "new_field": 3, "attention_dropout": 0.5}, None),
    ],
)
def test_fingerprint_knows_what_else_changes_the_logits(changes, said, tiny, tmp_path):
    base = shutil.copytree(tiny("llama"), tmp_path / "base")
    known, config = fingerprint(str(base)), json.loads((base / "config.json").read_text())
    config.pop("rope_parameters")  # transformers 5 keeps rope_theta in there, 4 beside it
    (base / "config.json").write_text(json.dumps({"rope_theta": 10000.0} | config | changes))
    found = difference(known, fingerprint(str(base)))
    assert said is None and found is None or said in found
    del known["config"]  # as an older version saved it
    assert difference(known, fingerprint(str(base))) is None


@pytest.mark.parametrize("legacy", [False, True])
def test_bin_files_old_damaged_and_malicious(legacy, tiny, tmp_path):
    """Files of torch before 1.6 cannot be mapped; what is no tensor is not run."""
    base, file = tmp_path / "base", tmp_path / "base" / "pytorch_model.bin"
    base.mkdir()
    shutil.copy(f"{tiny('llama')}/config.json", base)
    weights = AutoModelForCausalLM.from_pretrained(tiny("llama")).state_dict()
    torch.save(weights, file, _use_new_zipfile_serialization=not legacy)
    assert difference(fingerprint(tiny("llama")), fingerprint(str(base))) is None
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="pytorch_model.bin is damaged, or holds more than tensors"):
        fingerprint(str(base))
    torch.save({"x": pytest.raises}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match="pytorch_model.bin is damaged, or holds more than tensors"):
        fingerprint(str(base))


def test_a_base_that_cannot_be_compared_is_said(tiny, tmp_path, logged):
    record_base(tmp_path, facts_of(tiny("llama")))
    check_base(tmp_path, "someone/not-loaded-yet")
    assert sum("WARNING: Whether someone/not-loaded-yet is the base of" in line for line in logged) == 1


def test_adapter_of_another_base_is_refused(tiny, tmp_path, caplog):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": tiny("llama")}))
    check_base(tmp_path, tiny("qwen3"))  # it says nothing of its base: older adapters, other people's
    record_base(tmp_path, facts_of(tiny("llama")))
    check_base(tmp_path, tiny("llama"))
    with pytest.raises(UserError, match="is not the base of"):
        check_base(tmp_path, tiny("qwen3"))
    check_base(tmp_path, tiny("qwen3"), force=True)


@pytest.mark.parametrize(
    ("error", "line"), [(OSError("\n no such file\nmore"), "no such file"), (OSError(), "OSError")]
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line
