"""--plan: what it counts is what real tensors take, no weight is read, and the real model's peak is as foretold."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ADAPTER, MODEL, ROOT, SCRIPTS, in_process, results, stage
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import save_tiny_bert
from transformers import default_data_collator

import arguments.plan
import arguments.rehearsal
from arguments.adapter import AdapterArguments
from arguments.encoding import LengthArguments
from arguments.model import ModelArguments
from arguments.rehearsal import Load, Rehearsal, rehearse_pairs, rehearse_tokens
from arguments.rehearsal_ppo import PPORehearsal, rehearse_ppo
from arguments.reward import RewardSourceArguments
from arguments.shapes import Footprint
from reward_modeling import RewardArguments
from rl_training import PPOArguments
from supervised_finetuning import FinetuningArguments

ROW = list(range(3, 43))
REWARD = "--reward_model_name_or_path"


@pytest.fixture
def unreadable(tiny, records, tmp_path):
    """A model and a reward adapter on it whose weight files hold nothing that could be read."""
    model, reward = tmp_path / "model", tmp_path / "rm"
    shutil.copytree(tiny("llama"), model)
    in_process(*stage("rm", model, records, reward, "--max_steps", 1)).ok()
    for path in (model / "model.safetensors", reward / ADAPTER):
        path.write_bytes(bytes(path.stat().st_size))
    return model, reward


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_plan_reads_no_weights(name, unreadable, records, tmp_path):
    model, reward = unreadable
    flags = ("--plan", *((REWARD, reward) if name == "rl" else ()))
    said = in_process(*stage(name, model, records, tmp_path / "out", *flags)).ok().stdout
    assert "it fits" in said and "optimizer steps" in said and "GiB a checkpoint (2 kept)" in said
    lines = {line[:30].strip(): line[30:].split() for line in said.splitlines()}
    assert lines["memory, GiB"] == (["sample", "score", "update"] if name == "rl" else ["train", "evaluate"])
    roles = [label for label in arguments.plan.ROLES.values() if label in lines]
    for column, total in enumerate(lines["in all"]):
        assert sum(float(lines[role][column]) for role in roles) == pytest.approx(float(total), abs=0.01 * len(roles))
    assert not (tmp_path / "out").exists()


def rehearsals(model: str, output: Path):
    """Each stage's rehearsal on a small model."""
    groups = ModelArguments(model, dtype="float32"), AdapterArguments()
    flags = {"output_dir": str(output), "precision": "fp32", "report_to": "none", "gradient_accumulation_steps": 2}
    args, load = FinetuningArguments(**flags), Load(2)
    ppo = PPOArguments(output_dir=str(output), precision="fp32", report_to="none", batch_size=4)
    rows = Dataset.from_list([{"input_ids": ROW, "labels": ROW}] * 8)
    pair = {"chosen_ids": [*ROW, 7], "rejected_ids": [*ROW, 8, 9], "length": len(ROW) + 2, "together": len(ROW) + 3}
    pairs = Dataset.from_list([pair] * 8)
    reward_args = RewardArguments(**flags)
    reward = RewardSourceArguments(reward_functions=f"{__file__}:nothing")
    return {
        "tokens": partial(rehearse_tokens, *groups, args, rows, rows, default_data_collator, load),
        "pairs": partial(rehearse_pairs, *groups, reward_args, pairs, pairs, groups[0].load_tokenizer(), 64, load),
        "ppo": partial(rehearse_ppo, *groups, ppo, rows, rows, LengthArguments(max_target_length=8), reward, load),
    }


def nothing(prompts, completions, **columns):
    return [0.0] * len(prompts)


@pytest.mark.parametrize("name", ["tokens", "pairs", "ppo"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_shapes_take_what_real_tensors_take(name, family, tiny, tmp_path, monkeypatch):
    rehearse = rehearsals(tiny(family), tmp_path)[name]
    shapes = rehearse()
    monkeypatch.setattr(arguments.rehearsal, "without_storage", lambda build, device: build())
    real = rehearse()
    for phase, found in shapes.phases.items():
        expected = {role: size for role, size in real.phases[phase].items() if size}
        assert {role: size for role, size in found.items() if size} == pytest.approx(expected, rel=0.02)
    trained = sum(parameter.nbytes for parameter in real.trained)
    assert found["optimizer"] == pytest.approx(2 * trained, rel=0.05)  # two moments, and the numbers of steps
    assert found["gradients"] == trained


def test_a_plan_counts_the_layers_that_are_recomputed(tiny, tmp_path):
    """--activation_checkpointing_kwargs, as transformers reads them."""
    model = shutil.copytree(tiny("llama"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 8}))
    rows, found = Dataset.from_list([{"input_ids": ROW, "labels": ROW}] * 8), []
    for every in (1, 2, 4):
        settings = {"every_n_layers": every}
        flags = {"precision": "fp32", "report_to": "none", "activation_checkpointing_kwargs": settings}
        args = FinetuningArguments(output_dir=str(tmp_path / "out"), **flags)
        groups = ModelArguments(str(model), dtype="float32"), AdapterArguments(), args
        rehearsal = rehearse_tokens(*groups, rows, rows, default_data_collator, Load(8, checkpointing=True))
        found.append(rehearsal.phases["train"]["activations"])
    assert 1.2 * found[0] < found[1] and 1.2 * found[1] < found[2]


def test_a_plan_trains_what_the_run_trains(tiny, records, tmp_path):
    """The critic starts from the reward adapter, of another rank, whose base lies in another folder here."""
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm", "--max_steps", 1, "--lora_rank", 2)).ok()
    model = shutil.copytree(tiny("llama"), tmp_path / "copy")
    command = stage("rl", model, records, tmp_path / "rl", REWARD, tmp_path / "rm", "--critic", "adapter")
    said = in_process(*command, "--plan").ok().stdout
    in_process(*command).ok()
    files = [tmp_path / "rl" / name for name in (ADAPTER, "value/model.safetensors", "value/head.safetensors")]
    trained = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert f"trained {trained:,} " in said


def test_a_plan_goes_on_with_an_adapter(tiny, records, tmp_path):
    """It trains the adapter, of its own rank, and reads no weights of it."""
    command = stage("sft", tiny("llama"), records, tmp_path / "sft", "--max_steps", 1)
    in_process(*command, "--lora_rank", 2).ok()
    (tmp_path / "sft" / ADAPTER).write_bytes(bytes(9))
    flags = ("--lora_rank", 2), ("--peft_path", tmp_path / "sft")
    new, old = (in_process(*command, *some, "--plan").ok().stdout for some in flags)
    assert re.search("parameters.*", new)[0] == re.search("parameters.*", old)[0]


def test_a_plan_holds_a_reward_model_beside_the_policy(tiny, records, tmp_path):
    reward = Path(save_tiny_bert(tmp_path / "bert")) / "model.safetensors"
    extra = sum(tensor.numel() for tensor in load_file(reward).values())
    reward.write_bytes(bytes(reward.stat().st_size))
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm", "--max_steps", 1)).ok()
    sources = ("--reward_functions", f"{__file__}:nothing"), (REWARD, reward.parent), (REWARD, tmp_path / "rm")
    commands = (stage("rl", tiny("bloom"), records, tmp_path / "rl", *source, "--plan") for source in sources)
    said = [in_process(*command).ok().stdout for command in commands]
    alone, bert, adapter = (int(re.search(r"parameters +([\d,]+)", text)[1].replace(",", "")) for text in said)
    assert bert - alone == extra and adapter > alone  # an adapter on another base than the policy's


def test_a_reward_model_beside_the_policy_keeps_its_dtype(tiny, tmp_path):
    """Training in bf16 narrows the policy's frozen weights alone; rows are longer than this reward model knows."""
    bert, rows = save_tiny_bert(tmp_path / "bert"), Dataset.from_list([{"input_ids": ROW}] * 8)
    args = PPOArguments(output_dir=str(tmp_path), precision="bf16", use_cpu=True, report_to="none", batch_size=4)
    groups = ModelArguments(tiny("llama"), dtype="float32"), AdapterArguments(), args, rows, rows, LengthArguments()
    sources = {"reward_model_name_or_path": bert}, {"reward_functions": f"{__file__}:nothing"}
    beside, alone = (rehearse_ppo(*groups, RewardSourceArguments(**source), Load(2)) for source in sources)
    extra = sum(tensor.nbytes for tensor in load_file(Path(bert) / "model.safetensors").values())
    held = [found.phases["update"]["weights"] for found in (beside, alone)]
    assert 0 <= held[0] - held[1] - extra < 4096  # its buffers


def test_a_footprint_counts_what_is_alive():
    footprint = Footprint(vocabulary=7)
    with footprint.phase() as found:
        kept = torch.zeros(10, 7)  # 280 bytes of logits
        torch.zeros(100) + 1  # twice 400 bytes, gone at once
        view = kept[2:]
    assert view.untyped_storage().nbytes() == 280
    assert found == {"logits": 280, "activations": 800}
    assert footprint.now["activations"] == 0


def test_a_checkpoint_is_the_trained_weights_and_their_optimizer(tmp_path):
    trained = [torch.empty(2**28, device="meta")]  # 1 GiB
    phases = {"train": Counter(optimizer=2 * 2**30, weights=2**33)}
    args = SimpleNamespace(checkpoints_kept=2, output_dir=tmp_path / "out")
    for kind, size in ((Rehearsal, 3), (PPORehearsal, 4)):  # the guards keep the last good policy
        found = SimpleNamespace(trained=trained, phases=phases, copies=kind.copies)
        _, text = arguments.plan.disk(found, SimpleNamespace(use_peft=False), args)
        assert text.startswith(f"{size}.00 GiB a checkpoint (2 kept); ")


def test_advice_until_it_fits(tiny, records, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments.plan, "total_memory", lambda device: 1)
    said = in_process(*stage("sft", tiny("llama"), records, tmp_path / "out", "--plan")).ok().stdout
    assert "does not fit" in said and "still does not fit" in said
    assert "--per_device_train_batch_size 1 --activation_checkpointing --load_in_4bit half the length limits" in said


def test_advice_stops_where_it_fits():
    peaks = iter((50, 30))
    phases = lambda load: SimpleNamespace(phases={"train": SimpleNamespace(total=lambda: next(peaks))})  # noqa: E731
    lines = arguments.plan.advice(Load(4), "micro_batch_size", phases, 10, 40, lora=True)
    assert len(lines) == 4 and lines[2].startswith("  --micro_batch_size 1 --activation_checkpointing:")


# --- the real model

SHORT_RUN = ("--max_steps", "2", "--do_eval", "False", "--eval_on_start", "False")
BRIEF = {"sft": ("--gradient_accumulation_steps", "1"), "rm": ("--gradient_accumulation_steps", "1")}
BRIEF["rl"] = ("--batch_size", "16", "--max_steps", "1")


def launch(name: str, output: Path, *flags) -> str:
    """The script with the flags and the settings of its run script; returns what it prints."""
    script = (ROOT / f"scripts/run_{name}.sh").read_text().split('"${LAUNCH[@]}"')[1].split('"$@"')[0]
    data = {"sft": "finetune", "rm": "reward", "rl": "prompts"}[name]
    values = {"MODEL": MODEL, "OUTPUT": output, "REWARD_MODEL": output.parent / "rm"}
    values |= {"TRAIN": f"data/{data}/train", "VALIDATION": f"data/{data}/validation"}
    words = shlex.split(script.replace("\\\n", " "))
    words = [re.sub(r"\$(\w+)", lambda found: str(values[found[1]]), word) for word in words]
    words += [*SHORT_RUN, *BRIEF[name], *flags]
    command = f"source scripts/env.sh; {shlex.join([sys.executable, *words])}"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()[-3000:]
    return ended.stdout.decode()


@pytest.mark.slow
def test_the_peak_of_the_real_model_is_within_a_fifth_of_the_plan(default_model, tmp_path):
    figures = {}
    for name in ("sft", "rm", "rl"):  # the reward adapter of rm serves rl
        said = launch(name, tmp_path / name, "--plan")
        launch(name, tmp_path / name)
        planned = float(re.search(r"peak ([\d.]+) GiB", said)[1])
        figures[name] = planned, results(tmp_path / name)["peak_rss_gib"]
    print(figures)
    assert all(0.8 <= planned / measured <= 1.2 for planned, measured in figures.values()), figures
