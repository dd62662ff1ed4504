"""scripts/zero2.json, zero3.json, fsdp2.json: two gloo processes on a CPU end as one that shards nothing (slow)."""

import shutil

import pytest
from conftest import ADAPTER, ROOT, history, in_process, in_subprocess, merge, results, stage
from safetensors.torch import load_file
from torch.testing import assert_close

# accelerate shards over accelerators alone, unless it finds a process group of such a kind. DeepSpeed's own sums over
# shared memory are compiled for a minute, and wait by spinning: gloo's take their place.
ON_CPUS = """
import os, runpy, sys, torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

if "--deepspeed" in sys.argv:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]
else:
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    kind = {"distributed_type": DistributedType.MULTI_GPU, "num_processes": ranks}
    PartialState(backend="gloo")
    PartialState._shared_state.update(kind, process_index=rank, local_process_index=rank)
sys.argv = [*sys.argv[1:], "--accelerator_config", '{"use_configured_state": true}']
runpy.run_path(sys.argv[0], run_name="__main__")
print("trained by", AcceleratorState().distributed_type.value)
"""
SHORT = ("--use_cpu", "--max_eval_samples", 7, "--max_steps", 4, "--save_steps", 2)
EXACT = ("--precision", "fp32", *SHORT)
BATCH = "--per_device_train_batch_size"

pytestmark = pytest.mark.slow


@pytest.fixture
def sharded(warm_python, tmp_path):
    """sharded(config, command): run it on two processes."""
    (tmp_path / "driver.py").write_text(ON_CPUS)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, tmp_path / "driver.py")

    def run(config: str, command: list):
        if config.startswith("zero"):
            pytest.importorskip("deepspeed")
            command += ["--deepspeed", ROOT / "scripts" / config]
        else:
            command += ["--fsdp", "--fsdp_config", ROOT / "scripts" / config]
        variables = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "PYTHON_EXEC": warm_python}
        said = in_subprocess(*torchrun, *command, **variables).ok().stdout
        assert said.count(f"trained by {'DEEPSPEED' if config.startswith('zero') else 'FSDP'}") == 2

    return run


# Each of three stages with each of three configurations was seen; these are the ones that differ most.
CASES = [
    ("sft", "zero2.json"),
    ("sft", "zero3.json"),
    ("sft", "fsdp2.json"),
    ("pt", "zero3.json"),
    ("rm", "fsdp2.json"),
]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_two_processes_that_shard_train_as_one(name, config, sharded, tiny, records, tmp_path):
    llama, one, two = tiny("llama"), tmp_path / "one", tmp_path / "two"
    in_process(*stage(name, llama, records, one, *EXACT, BATCH, 6)).ok()  # of eight records: the second batch has two
    sharded(config, stage(name, llama, records, two, *EXACT, BATCH, 3))
    alone, together = load_file(one / ADAPTER), load_file(two / ADAPTER)
    assert alone.keys() == together.keys()
    for key in alone:
        assert_close(together[key], alone[key], atol=1e-4, rtol=0)
    assert results(two)["eval_loss"] == pytest.approx(results(one)["eval_loss"], rel=1e-4)
    in_process(*merge(llama, two, tmp_path / "merged")).ok()
    ended = in_process(*stage(name, llama, records, two, *EXACT, BATCH, 6))
    flag = "--fsdp" if config == "fsdp2.json" else f"--deepspeed of ZeRO stage {config[4]} on 2 processes"
    assert ended.code == 2 and f"trained with {flag}, and its tensors do not fit an" in ended.errors[0]
    if config != "zero3.json" or name != "sft":  # going on was seen with the others too
        return
    shutil.rmtree(two / "checkpoint-4")
    (two / ADAPTER).unlink()
    sharded(config, stage(name, llama, records, two, *EXACT, BATCH, 3))
    again = load_file(two / ADAPTER)
    assert all((again[key] == together[key]).all() for key in together), "it went on from checkpoint-2"


# Neither DeepSpeed nor FSDP2 computes under autocast: dtypes must agree in every product, of a score head, too.
HALVES = [
    ("rm", "zero2.json", ()),
    ("rm", "zero3.json", ("--use_peft", "False", "--attn_implementation", "eager")),  # two rows a pair in both runs
    ("sft", "zero3.json", ("--modules_to_save", "embed_tokens", "--activation_checkpointing")),
    ("rm", "fsdp2.json", ()),
]


@pytest.mark.parametrize(("name", "config", "flags"), HALVES)
def test_in_bf16_too(name, config, flags, sharded, tiny, records, tmp_path):
    llama, one, two = tiny("llama"), tmp_path / "one", tmp_path / "two"
    flags = *SHORT, "--precision", "bf16", "--logging_steps", 1, *flags
    in_process(*stage(name, llama, records, one, *flags, BATCH, 4)).ok()
    sharded(config, stage(name, llama, records, two, *flags, BATCH, 2))
    losses = history(one, "loss")
    assert len(losses) == 4 and history(two, "loss") == pytest.approx(losses, rel=0.04), "bf16 rounds"
    assert results(two)["eval_loss"] == pytest.approx(results(one)["eval_loss"], rel=0.04)
    if "--use_peft" not in flags:
        moved = [weight.any() for name, weight in load_file(two / ADAPTER).items() if "lora_B" in name]
        assert moved and all(moved)
        in_process(*merge(llama, two, tmp_path / "merged")).ok()


@pytest.mark.parametrize(
    ("settings", "flags", "message"),
    [
        ('{"zero_optimization": {"stage": 2}}', (), "does not enable bf16: add"),
        ('{"bf16": {"enabled": false}}', (), "does not enable bf16: add"),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}', (), "there is none here"),
        ('{"zero_optimization": {"stage": 2}}', ("--bf16=False", "--precision", "fp32"), "there is none here"),
        ('{"bf16": ', (), "is not JSON"),
        ("[]", (), "is not a JSON object: scripts"),
    ],
)
def test_a_deepspeed_file_that_would_compute_in_another_precision(settings, flags, message, tiny, records, tmp_path):
    pytest.importorskip("deepspeed")
    (tmp_path / "own.json").write_text(settings)
    flags = "--bf16", "--deepspeed", tmp_path / "own.json", *flags
    ended = in_process(*stage("pt", tiny("llama"), records, tmp_path / "out", *flags))
    assert ended.code == 2 and message in ended.errors[0]
