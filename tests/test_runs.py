"""Runs that are told to end, meet numbers that are not finite, or find the disk full."""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from conftest import ADAPTER, ROOT, SCRIPTS, in_process, in_subprocess, merge, results, stage
from peft import TaskType
from safetensors.torch import load_file
from test_kills import differences, forked, trained
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import arguments.atomic
import arguments.checkpoints
import arguments.data
import arguments.run
from arguments.adapter import AdapterArguments
from arguments.atomic import write_atomically
from arguments.checkpoints import SEAL, SHAPING, checkpoint_fault, clear_output, shape
from arguments.command_line import Fault, explained
from arguments.loss import TokenLoss
from arguments.stops import FiniteGradients, StopAtSignal


def flags_of(name, tiny, records, tmp_path):
    if name != "rl":
        return ("--max_steps", 40, "--save_steps", 100, "--per_device_train_batch_size", 2)
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    return ("--max_steps", 12, "--save_steps", 100, "--reward_model_name_or_path", tmp_path / "rm")


@pytest.mark.parametrize(("name", "number"), [("sft", signal.SIGINT), ("rl", signal.SIGTERM)])
def test_a_signal_ends_with_a_checkpoint_to_go_on_from(name, number, tiny, records, tmp_path):
    command = stage(name, tiny("llama"), records, tmp_path / "out", *flags_of(name, tiny, records, tmp_path))
    whole = [tmp_path / "whole" if part == tmp_path / "out" else part for part in command]
    assert forked(whole) == 0
    child = os.fork()
    if child == 0:
        os._exit(in_process(*command).code)
    while not list((tmp_path / "out").rglob("events.out.tfevents*")):  # training has begun
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it trained"
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert checkpoint_fault(checkpoint) is None
    assert not (tmp_path / "out" / "all_results.json").exists()

    assert forked(command) == 0
    found, expected = trained(tmp_path / "out"), trained(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_during_an_evaluation_ends_behind_it(step, tiny, records, tmp_path, monkeypatch):
    """Also during the last one inside training."""
    evaluate = TokenLoss.evaluate

    def interrupted(self, *args, **kwargs):
        if self.is_in_train and self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *args, **kwargs)

    flags = "--max_steps", 4, "--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "no"
    in_process(*stage("sft", tiny("llama"), records, tmp_path / "whole", *flags)).ok()
    command = stage("sft", tiny("llama"), records, tmp_path / "out", *flags)
    with monkeypatch.context() as patched:
        patched.setattr(TokenLoss, "evaluate", interrupted)
        assert in_process(*command).code == 128 + signal.SIGTERM
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    in_process(*command).ok()
    assert not differences(trained(tmp_path / "out"), trained(tmp_path / "whole"))


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    codes, callback = [], StopAtSignal(1)
    monkeypatch.setattr(os, "_exit", codes.append)
    callback.receive(signal.SIGTERM, None)
    callback.receive(signal.SIGTERM, None)
    assert codes == [] and callback.signal == signal.SIGTERM
    callback.receive(signal.SIGINT, None)
    assert codes == [130]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_model_with_a_nan_is_not_trained(name, tiny, records, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    broken = tmp_path / "broken"
    AutoModelForCausalLM.from_pretrained(tiny("llama")).save_pretrained(broken)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    model.save_pretrained(broken)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (broken / file).write_bytes((type(tmp_path)(tiny("llama")) / file).read_bytes())
    flags = ("--eval_on_start", "False")
    if name == "rl":
        rule = tmp_path / "rule.py"
        rule.write_text("def one(completions, **kwargs):\n    return [1.0 for _ in completions]\n")
        flags += ("--reward_functions", f"{rule}:one", "--guards", "off")
    ended = in_process(*stage(name, broken, records, tmp_path / "out", *flags))
    assert ended.code == 1, ended.stderr[-500:]
    assert len(ended.errors) == 1 and "not finite" in ended.errors[0]
    assert not (tmp_path / "out" / ADAPTER).exists() and not list((tmp_path / "out").glob("checkpoint-*"))


def test_numbers_that_run_away_end_the_run_and_are_not_saved(tiny, records, tmp_path):
    flags = ("--learning_rate", 1e30, "--save_steps", 1, "--max_steps", 6, "--save_total_limit", 9)
    ended = in_process(*stage("sft", tiny("llama"), records, tmp_path / "out", *flags))
    assert ended.code == 1 and "the gradients of batch " in ended.stderr
    checkpoints = list((tmp_path / "out").glob("checkpoint-*"))
    assert checkpoints
    for checkpoint in checkpoints:
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / ADAPTER).values())


@pytest.mark.parametrize(
    "flags",
    [
        ("--save_steps", 1),
        ("--max_steps", 1),
        ("--save_strategy", "epoch"),
        ("--max_steps", 1, "--save_strategy", "no"),  # at the end alone
    ],
)
def test_a_step_that_is_too_large_is_not_saved(flags, tiny, records, tmp_path):
    """Its gradients are finite, what it makes of the weights is not."""
    command = stage("sft", tiny("llama"), records, tmp_path / "out", "--learning_rate", 1e39, "--max_grad_norm", 1e9)
    ended = in_process(*command, "--do_eval", "False", "--per_device_train_batch_size", 8, *flags)
    assert ended.code == 1 and "trained weights are not finite after step 1: they are not saved" in ended.stderr
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_fp16_skips_overflows_until_the_scale_is_spent():
    model = torch.nn.Linear(1, 1)
    model.weight.grad = torch.tensor([[torch.inf]])
    state, callback, scale = SimpleNamespace(global_step=4, epoch=0.5), FiniteGradients(), [65536.0]
    optimizer = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale[0]))

    def step():
        callback.on_pre_optimizer_step(None, state, None, model=model, optimizer=optimizer)

    for _ in range(10):
        step()
    scale[0] = 0.5
    step(), step()
    model.weight.grad = torch.tensor([[1.0]])
    step()  # a good one between: the count starts anew
    model.weight.grad = torch.tensor([[torch.nan]])
    step(), step()
    with pytest.raises(Fault, match=r"gradients of batch 5 \(epoch 0.500\)"):
        step()
    assert callback.skipped == 15


@pytest.mark.parametrize(("step", "last"), [(3, 3), (4, 4), (3, 9)])
def test_fp16_that_skipped_every_step_has_learned_nothing(step, last):
    callback = FiniteGradients()
    callback.skipped = 3
    with pytest.raises(Fault, match="all 3 steps") if step == last == 3 else contextlib.nullcontext():
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=last), None)


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small file system at `folder`, which is made."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a small tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_said_in_one_line(tiny, records, tmp_path):
    with mounted(tmp_path / "disk", "size=200k") as disk:
        command = stage("sft", tiny("llama"), records, disk / "out", "--save_steps", 1, "--report_to", "none")
        ended = in_subprocess(*command)
    assert ended.code == 1
    assert "error: cannot write" in ended.stderr and "Traceback" not in ended.stderr


def test_a_disk_that_is_full_inside_torch_save():
    """What its writer says when it is closed; it hides what the disk said."""
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    assert "cannot write or read" in str(explained(error))


def test_a_rank_that_has_gone_is_said_in_one_line():
    """In gloo's words, of its two kinds."""
    for said in ("Connection closed by peer [127.0.0.1]:4711", "Read error [::1]:5: Connection reset by peer"):
        error = explained(RuntimeError(f"[../third_party/gloo/gloo/transport/tcp/pair.cc:547] {said}"))
        assert error.code == 1 and "another process of this run ended first" in str(error)
    assert explained(ConnectionError("Connection reset by peer")) is None, "a hub's or a server's"


def test_the_last_whole_checkpoint_stays_until_the_next_one_is(tiny, records, tmp_path, monkeypatch):
    """With one checkpoint to keep, and a disk that is full when the second one is sealed."""
    thorough = arguments.checkpoints.size_and_hash

    def digest(path):
        if path.parent.name == "checkpoint-2":
            raise OSError(28, "No space left on device")
        return thorough(path)

    monkeypatch.setattr(arguments.checkpoints, "size_and_hash", digest)
    command = stage("sft", tiny("llama"), records, tmp_path / "out", "--save_steps", 1, "--save_total_limit", 1)
    assert in_process(*command).code == 1
    assert checkpoint_fault(tmp_path / "out" / "checkpoint-1") is None
    monkeypatch.undo()
    assert "checkpoint-1 (--fresh" in in_process(*command).ok().stderr
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.parametrize(("name", "asked"), [("rm", "accuracy_shrt"), ("rl", "rewrd"), ("rl", "loss")])
def test_a_metric_that_nothing_evaluates_is_said_before_training(name, asked, tiny, records, tmp_path):
    (tmp_path / "r.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    own = {"rm": (), "rl": ("--reward_functions", f"{tmp_path / 'r.py'}:one")}[name]
    best = ("--eval_on_start", "--load_best_model_at_end", "--metric_for_best_model", asked, "--eval_steps", 1)
    ended = in_process(*stage(name, tiny("llama"), records, tmp_path / "out", *own, *best, "--save_steps", 1))
    assert ended.code == 2 and re.search(f"model {asked}( is not evaluated here|: no held-out pair)", ended.errors[0])
    assert " loss=" not in ended.stderr and not list((tmp_path / "out").glob("checkpoint-*"))
    unused = ("--metric_for_best_model", asked)
    in_process(*stage(name, tiny("llama"), records, tmp_path / "other", *own, *unused)).ok()


def test_results_that_a_kill_cut_short_are_made_again(tiny, records, tmp_path):
    """transformers writes all_results.json in place, and reads it to add to it."""
    command = stage("sft", tiny("llama"), records, tmp_path / "out")
    in_process(*command).ok()
    path, expected = tmp_path / "out" / "all_results.json", results(tmp_path / "out")
    path.write_bytes(path.read_bytes()[:40])
    in_process(*command).ok()
    assert results(tmp_path / "out").keys() == expected.keys()
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_a_model_card_that_was_cut_inside_a_character_is_made_again(tiny, records, tmp_path):
    """peft reads it, to add to it, at each save: also into a checkpoint's folder that a kill left unsealed."""
    paths = [tmp_path / "out" / folder / "README.md" for folder in (".", "checkpoint-3")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("# 模型".encode()[:-1])
    in_process(*stage("sft", tiny("llama"), records, tmp_path / "out")).ok()
    assert all("peft" in path.read_text("utf-8") for path in paths)


def test_our_results_are_written_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "all_results.json"
    write_atomically(path, "{}")
    monkeypatch.setattr(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if child == 0:
        write_atomically(path, '{"eval_loss": 2.5}')
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL and path.read_text() == "{}"


def test_the_peak_is_not_that_of_the_process_that_started_ours():
    """Linux's ru_maxrss would begin with it."""
    held = b"1" * 2**31
    command = "from arguments.telemetry import peak_memory; print(peak_memory()['peak_rss_gib'])"
    said = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0.1 < float(said) < 0.9 * len(held) / 2**30


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tiny, records, tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        ended = in_process(*stage("sft", tiny("llama"), records, disk / "out", "--report_to", "none"))
    assert ended.code == 1 and len(ended.errors) == 1 and "Read-only file system" in ended.errors[0]


def test_a_data_file_that_vanishes_is_said_in_one_line(tiny, records, tmp_path, monkeypatch):
    """It is listed, and gone when it is read."""
    monkeypatch.setattr(arguments.data, "find_files", lambda folder: [tmp_path / "rows.jsonl"])
    ended = in_process(*stage("sft", tiny("llama"), records, tmp_path / "out"))
    assert ended.code == 1 and len(ended.errors) == 1 and "rows.jsonl is not there, or not any more" in ended.errors[0]


def test_nothing_is_written_outside_the_output_folder(tiny, records, tmp_path):
    def files() -> set:
        return {*Path(tiny("llama")).rglob("*"), *records.rglob("*"), *ROOT.iterdir(), *Path.home().iterdir()}

    before = files()
    in_process(*stage("sft", tiny("llama"), records, tmp_path / "out")).ok()
    in_process(*merge(tiny("llama"), tmp_path / "out", tmp_path / "merged")).ok()
    assert files() == before and {path.name for path in tmp_path.iterdir()} == {"out", "merged"}


def test_the_output_folder_of_another_run(tiny, records, tmp_path):
    """Checkpoints of another stage, or of another adapter: nothing is resumed, and nothing of them is lost."""
    output = tmp_path / "out"
    in_process(*stage("sft", tiny("llama"), records, output, "--save_steps", 2)).ok()
    before = {path: path.read_bytes() for path in output.rglob("*.safetensors")}
    (output / "run.json").unlink()  # as if it had not ended
    ended = in_process(*stage("pt", tiny("llama"), records, output))
    assert ended.code == 2 and "checkpoints of another stage (FinetuningArguments)" in ended.errors[0]
    ended = in_process(*stage("sft", tiny("llama"), records, output, "--lora_rank", 2, "--max_steps", 5))
    assert ended.code == 2 and "do not fit --lora_rank 2" in ended.errors[0]
    assert {path: path.read_bytes() for path in output.rglob("*.safetensors")} == before
    in_process(*stage("sft", tiny("llama"), records, output)).ok()
    for checkpoint in output.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    ended = in_process(*stage("pt", tiny("llama"), records, output))  # what it made is there still
    assert ended.code == 2 and "holds what supervised_finetuning.py made" in ended.errors[0]
    in_process(*stage("pt", tiny("llama"), records, output, "--fresh")).ok()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_that_has_ended_trains_nothing_more(name, tiny, records, tmp_path):
    """Its end falls inside an epoch, at a rate that would still move the weights."""
    flags = ("--max_steps", 1, "--save_steps", 1, "--lr_scheduler_type", "constant")
    if name == "rl":
        in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
        flags += ("--reward_model_name_or_path", tmp_path / "rm")
    else:
        flags += ("--per_device_train_batch_size", 2)
    command = stage(name, tiny("llama"), records, tmp_path / "out", *flags)
    in_process(*command).ok()
    before, checkpoints = trained(tmp_path / "out"), sorted(tmp_path.glob("out/checkpoint-*"))
    figures = (tmp_path / "out" / "train_results.json").read_text()
    assert "Going on from" in in_process(*command).ok().stderr
    assert not differences(trained(tmp_path / "out"), before)
    assert sorted(tmp_path.glob("out/checkpoint-*")) == checkpoints
    assert (tmp_path / "out" / "train_results.json").read_text() == figures
    assert results(tmp_path / "out")["train_loss"] == json.loads(figures)["train_loss"]


def test_the_dropout_that_is_asked_for_is_of_the_reward_model_too(tiny, records, tmp_path):
    """trl would turn it off."""
    for dropout in ("0", "0.5"):
        flags = ("--lora_dropout", dropout, "--max_steps", 1, "--lr_scheduler_type", "constant", "--warmup_steps", 0)
        in_process(*stage("rm", tiny("llama"), records, tmp_path / dropout, *flags)).ok()
    assert differences(trained(tmp_path / "0"), trained(tmp_path / "0.5"))


def test_fresh_leaves_nothing_of_another_kind(tiny, records, tmp_path):
    """An adapter that stays beside whole weights would be put on them, or merged in their place."""
    output = tmp_path / "out"

    def kinds() -> set[str]:
        return {path.name for path in output.iterdir()} & {"adapter_config.json", "base.json", "config.json", ADAPTER}

    in_process(*stage("rm", tiny("llama"), records, output)).ok()
    path = output / "all_results.json"
    path.write_text(json.dumps(results(output) | {"eval_accuracy_short": 0.5}))
    (output / "training_of_before.png").touch()
    (output / "runs").mkdir(exist_ok=True)
    (output / "runs" / "of_before").touch()
    in_process(*stage("rm", tiny("llama"), records, output, "--use_peft", "False", "--fresh")).ok()
    assert kinds() == {"config.json"} and (output / "model.safetensors").exists()
    assert "eval_accuracy_short" not in results(output)
    assert not (output / "training_of_before.png").exists() and not (output / "runs" / "of_before").exists()
    in_process(*stage("rm", tiny("llama"), records, output, "--fresh")).ok()
    assert kinds() == {"adapter_config.json", "base.json", ADAPTER} and not (output / "model.safetensors").exists()


@pytest.mark.parametrize("place", ["", "adapter", "checkpoint-2"])
def test_fresh_leaves_what_the_run_starts_from(place, tmp_path):
    for folder in ("", "adapter", "checkpoint-1", "checkpoint-2"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ADAPTER).touch()
    (tmp_path / "merge.json").touch()
    (tmp_path / "checkpoint-2-best").mkdir()  # somebody's copy
    clear_output(tmp_path, ["base", str(tmp_path / place)])
    left = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(ADAPTER)}
    assert left == {place or "."} and (tmp_path / "checkpoint-2-best").exists()


def test_fresh_leaves_a_checkpoint_with_what_the_run_starts_from_in_it(tmp_path):
    for folder in ("checkpoint-1/merged", "checkpoint-2"):
        (tmp_path / folder).mkdir(parents=True)
    clear_output(tmp_path, [str(tmp_path / "checkpoint-1" / "merged")])
    assert (tmp_path / "checkpoint-1" / "merged").exists() and not (tmp_path / "checkpoint-2").exists()


def test_fresh_leaves_what_no_run_made(tmp_path, logged):
    (tmp_path / "adapter").mkdir()
    for name in (f"adapter/{ADAPTER}", "exam_results.json", "notes.txt", "train_results.json"):
        (tmp_path / name).touch()
    clear_output(tmp_path, ["base"])
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {f"adapter/{ADAPTER}", "exam_results.json", "notes.txt"}
    assert [line for line in logged if "Removing" in line and "train_results.json" in line]


def test_two_runs_do_not_share_a_folder(tiny, records, tmp_path, monkeypatch):
    command = stage("sft", tiny("llama"), records, tmp_path / "out")
    monkeypatch.setattr(arguments.atomic, "PATIENCE", 0.0)
    (tmp_path / "out").mkdir()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    ended = in_process(*command)
    assert ended.code == 2 and "another run is writing there" in ended.errors[0]
    assert not any((tmp_path / "out").iterdir())
    os.close(other)  # as a process's end does
    in_process(*command).ok()


def test_an_evaluation_alone_leaves_the_figures_of_a_training(tiny, records, tmp_path):
    in_process(*stage("sft", tiny("llama"), records, tmp_path / "out")).ok()
    before = results(tmp_path / "out")
    ended = in_process(*stage("sft", tiny("llama"), records, tmp_path / "out", "--do_train", "False"))
    assert ended.code == 2 and "name another --output_dir" in ended.errors[0]
    assert results(tmp_path / "out") == before
    flags = "--do_train", "False", "--peft_path", tmp_path / "out"
    for _ in range(2):
        in_process(*stage("sft", tiny("llama"), records, tmp_path / "again", *flags)).ok()
        assert results(tmp_path / "again")["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-5)


def test_a_metric_that_an_evaluation_does_not_have(tiny, records, tmp_path):
    flags = "--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1
    command = stage("pt", tiny("llama"), records, tmp_path / "out", *flags, "--metric_for_best_model", "bleu")
    ended = in_process(*command)
    assert ended.code == 2 and "--metric_for_best_model" in ended.errors[0] and "eval_loss" in ended.errors[0]


def test_blocks_have_one_length(tiny, records, tmp_path):
    for strategy in ("group_by_length", "random"):
        flags = "--train_sampling_strategy", strategy
        in_process(*stage("pt", tiny("llama"), records, tmp_path / strategy, *flags)).ok()
    assert not differences(trained(tmp_path / "group_by_length"), trained(tmp_path / "random"))


@pytest.mark.parametrize("all_weights", [(), ("--use_peft", "False")])
def test_a_run_goes_on_from_its_own_base_only_and_says_what_changed(all_weights, tiny, records, tmp_path):
    output, moved = tmp_path / "out", tmp_path / "moved"
    flags = ("--max_steps", 2, "--save_steps", 1, "--fresh")
    in_process(*stage("sft", tiny("llama"), records, output, *flags, *all_weights)).ok()
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(moved)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.save_pretrained(moved)
    before = {path: path.read_bytes() for path in output.rglob("*.safetensors")}
    again = ("--max_steps", 3, "--save-steps", 1, *all_weights)  # --save_steps in another spelling
    ended = in_process(*stage("sft", moved, records, output, *again))
    assert ended.code == 2 and f"was not trained on {moved}" in ended.errors[0] and "--fresh" in ended.errors[0]
    assert {path: path.read_bytes() for path in output.rglob("*.safetensors")} == before
    ended = in_process(*stage("sft", tiny("llama"), records, output, *again)).ok()
    assert "The command has changed since: --max_steps 3 (was 2). The learning rate, and how far" in ended.stderr
    in_process(*stage("sft", moved, records, output, "--max_steps", 1, "--fresh")).ok()


def test_figures_of_before_training_are_of_the_same_records(tiny, records, tmp_path):
    """A run that goes on with other held-out records has none to compare the last ones with."""
    output = tmp_path / "out"
    flags = ("--eval_on_start", "--save_steps", 1)
    in_process(*stage("sft", tiny("llama"), records, output, *flags, "--max_steps", 1)).ok()
    before = results(output)
    assert before["eval_tokens_before"] == before["eval_tokens"]
    flags += ("--max_steps", 2, "--max_eval_samples", 1)
    ended = in_process(*stage("sft", tiny("llama"), records, output, *flags)).ok()
    assert "The held-out records are others than when this run began" in ended.stderr
    found = results(output)
    assert found["eval_tokens"] < before["eval_tokens"] and not [name for name in found if name.endswith("_before")]


def test_a_run_goes_on_with_its_own_tensors_only(tiny, records, tmp_path):
    command = (*stage("sft", tiny("llama"), records, tmp_path / "out"), "--save_steps", 1)
    in_process(*command, "--max_steps", 1).ok()
    for flag, value in (
        ("--use_peft", "False"),
        ("--target_modules", "q_proj"),
        ("--modules_to_save", "lm_head"),
        ("--optim", "sgd"),
    ):
        ended = in_process(*command, "--max_steps", 2, flag, value)
        assert ended.code == 2 and f"do not fit {flag} {value.lower()}: give the same again" in ended.errors[0]
    same = [word for name, default in SHAPING.items() if default != "none" for word in (f"--{name}", default)]
    in_process(*command, "--max_steps", 2, *same).ok()


def test_weights_alone_are_not_gone_on_from(tiny, records, tmp_path):
    """The optimizer would start anew, and the learning rate at its peak."""
    command = (*stage("sft", tiny("llama"), records, tmp_path / "out"), "--save_steps", 1, "--save_only_model", "True")
    in_process(*command, "--max_steps", 1).ok()
    before = trained(tmp_path / "out")
    ended = in_process(*command, "--max_steps", 2)
    assert ended.code == 2 and "checkpoint-1 holds weights alone (--save_only_model)" in ended.errors[0]
    assert not differences(trained(tmp_path / "out"), before)
    in_process(*command, "--max_steps", 2, "--fresh").ok()


def test_an_optimizer_that_was_sharded_is_not_gone_on_from(tiny, records, tmp_path):
    command = (*stage("sft", tiny("llama"), records, tmp_path / "out"), "--save_steps", 1)
    in_process(*command, "--max_steps", 1).ok()
    path = tmp_path / "out" / "checkpoint-1" / SEAL
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sharding": "--fsdp"}))
    ended = in_process(*command, "--max_steps", 2)
    assert ended.code == 2 and "trained with --fsdp, and its tensors do not fit an optimizer that" in ended.errors[0]


def test_another_batch_is_said_to_skip_or_repeat_records(tiny, records, tmp_path):
    command = (*stage("sft", tiny("llama"), records, tmp_path / "out"), "--save_steps", 1)
    batch, product = "--per_device_train_batch_size", "--gradient_accumulation_steps"
    in_process(*command, "--max_steps", 1, batch, 2).ok()
    assert "skipped" not in in_process(*command, "--max_steps", 2, batch, 1, product, 2).ok().stderr
    said = in_process(*command, "--max_steps", 3, batch, 4).ok().stderr
    assert "step took 2 records, and now takes 4: records of this epoch are skipped or repeated" in said


def test_a_run_that_went_back_goes_on_where_it_was_killed(tiny, records, tmp_path):
    output = tmp_path / "out"
    command = (*stage("sft", tiny("llama"), records, output), "--save_steps", 1, "--max_steps", 4)
    in_process(*command, "--save_total_limit", 9).ok()
    back = (*command, "--resume_from_checkpoint", output / "checkpoint-1", "--weight_decay", 0.1)
    back = (*back, "--save_total_limit", 3)
    said = in_process(*back).ok().stderr
    assert f"Removing {output / 'checkpoint-4'}" in said and f"Going on from {output / 'checkpoint-1'}" in said
    assert not (output / "checkpoint-1").exists(), "this test is of the checkpoint asked for being deleted since"
    expected = trained(output)
    shutil.rmtree(output / "checkpoint-4")
    assert f"Going on from {output / 'checkpoint-3'}" in in_process(*back).ok().stderr
    assert not differences(trained(output), expected)


def test_copies_of_checkpoints_are_left_alone_and_an_empty_seal_is_none(tiny, records, tmp_path):
    command = (*stage("sft", tiny("llama"), records, tmp_path / "out"), "--save_steps", 1, "--save_total_limit", 1)
    in_process(*command, "--max_steps", 2).ok()
    kept = shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-2-best")
    (tmp_path / "out" / "checkpoint-1-notes").mkdir()
    in_process(*command, "--max_steps", 4).ok()
    assert checkpoint_fault(kept) is None and (tmp_path / "out" / "checkpoint-1-notes").is_dir()
    (tmp_path / "out" / "checkpoint-4" / SEAL).write_text("")  # as a power cut may leave it
    said = in_process(*command, "--max_steps", 5).ok().stderr
    assert "Not going on from" in said and "checkpoint-4: its saving was interrupted" in said


def test_the_defaults_of_what_shapes_a_checkpoint():
    groups = fields(AdapterArguments) + fields(TrainingArguments)
    defaults = {field.name: str(getattr(field.default, "value", field.default)).lower() for field in groups}
    assert {name: defaults[name].removesuffix("_fused") for name in SHAPING} == SHAPING


def test_all_spellings_of_a_flag_shape_alike():
    for flags in ({"use_peft": "0"}, {"no_use_peft": ""}, {"use_peft": "false", "lora_rank": "4"}):
        assert shape(flags, "use_peft") == "false" and shape(flags, "lora_rank") == "8"
    assert shape({"use_peft": ""}, "use_peft") == shape({"use_peft": "yes"}, "use_peft") == "true"
    assert shape({"target_modules": "v_proj, q_proj"}, "target_modules") == "q_proj,v_proj"
    assert shape({"optim": "adamw_torch_fused"}, "optim") == "adamw_torch" != shape({"optim": "sgd"}, "optim")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_pad_token_behind_the_last_embedding_is_not_taken(name, tiny, records, tmp_path):
    """As where [PAD] was added to a Llama 2 without resizing it."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "[PAD]"}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == AutoConfig.from_pretrained(folder).vocab_size
    rewards = ("--reward_model_name_or_path", "", "--reward_functions", f"{__file__}:one") if name == "rl" else ()
    flags = ("--block_size", 500) if name == "pt" else ()
    in_process(*stage(name, folder, records, tmp_path / "out", *rewards, *flags)).ok()


def one(completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "saved"),
    [("rm", None), ("sft", "lm_head,embed_tokens"), ("sft", "norm,down_proj"), ("rm", "score,layers.0.self_attn")],
)
def test_what_is_trained_is_in_float32_on_a_base_that_is_not(name, saved, precision, tiny, records, tmp_path):
    """A score head and modules saved in full too: fp16's loss scaling refuses other gradients."""
    flags = ["--dtype", "bfloat16", "--precision", precision, *(["--modules_to_save", saved] if saved else [])]
    output = tmp_path / "out"
    in_process(*stage(name, tiny("llama"), records, output, *flags)).ok()
    tensors = load_file(output / ADAPTER)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    full = [name for name in tensors if "lora" not in name]
    assert len(full) == {None: 1, "lm_head,embed_tokens": 2, "norm,down_proj": 7}.get(saved, 5)
    in_process(*merge(tiny("llama"), output, tmp_path / "merged")).ok()


@pytest.mark.parametrize("name", ["pt", "rm"])
def test_modules_saved_in_full_are_evaluated_in_16_bits(name, tiny, records, tmp_path):
    """Such an evaluation casts the frozen layers behind them, too."""
    flags = "--modules_to_save", "embed_tokens", "--precision", "fp32", "--bf16_full_eval"
    in_process(*stage(name, tiny("llama"), records, tmp_path / "out", *flags)).ok()
    assert math.isfinite(results(tmp_path / "out")["eval_loss"])


@pytest.mark.parametrize(
    "flags", [("--hub_token", "hf_secret"), ("--hub-token", "hf_secret"), ("--hub-token=hf_secret",)]
)
def test_no_secret_is_saved_and_no_telemetry_sent(flags, tiny, records, tmp_path):
    in_process(*stage("sft", tiny("llama"), records, tmp_path / "out", *flags, "--save_steps", 2)).ok()
    assert list((tmp_path / "out").rglob("seal.json"))
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY and not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS


@pytest.mark.parametrize("name", ["pt", "sft", "rm", "rl"])
def test_kept_casts_change_no_number(name, tiny, records, tmp_path, monkeypatch):
    """Frozen weights in bfloat16 give the losses and weights of float32 ones that autocast casts at every product."""
    flags = ("--precision", "bf16", "--dtype", "float32", "--seed", 3)
    if name == "rl":
        in_process(*stage("rm", tiny("llama"), records, tmp_path / "reward")).ok()
        flags += ("--reward_model_name_or_path", tmp_path / "reward")
    in_process(*stage(name, tiny("llama"), records, tmp_path / "kept", *flags)).ok()
    monkeypatch.setattr(arguments.run.RunArguments, "avoid_casts", lambda self, model: None)
    in_process(*stage(name, tiny("llama"), records, tmp_path / "cast", *flags)).ok()
    kept, cast = trained(tmp_path / "kept"), trained(tmp_path / "cast")
    assert kept.keys() == cast.keys() and all(torch.equal(kept[key], cast[key]) for key in kept)
    for key in ("eval_loss", "eval_reward", "eval_kl"):
        assert results(tmp_path / "kept").get(key) == results(tmp_path / "cast").get(key)


def test_only_frozen_linear_layers_are_kept_cast(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    run = SimpleNamespace(bf16=True)
    arguments.run.RunArguments.avoid_casts(run, model.requires_grad_(False))
    dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}
    linear = {name for name in dtypes if "proj" in name}
    assert linear and all((dtypes[name] == torch.bfloat16) == (name in linear) for name in dtypes)


def test_a_head_that_is_saved_in_full_stays_as_it_is(tiny):
    """What peft keeps of it is tied to the frozen embeddings here."""
    model = AutoModelForCausalLM.from_pretrained(tiny("gemma3"))
    adapter_args = AdapterArguments(target_modules="q_proj", modules_to_save="lm_head")
    model = adapter_args.apply(model, TaskType.CAUSAL_LM)
    arguments.run.RunArguments.avoid_casts(SimpleNamespace(bf16=True), model)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.get_submodule("base_model.model.lm_head.original_module").weight.dtype == torch.float32
