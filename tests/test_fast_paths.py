"""What makes training fast must not change what is learned: each fast path beside the plain one, on the real model."""

import pytest
from conftest import ROOT, SCRIPTS, history, in_process, results

DATA = ROOT / "data"
PLAIN = ("--precision", "fp32", "--train_sampling_strategy", "random")
STAGES = {
    "pt": ("pretrain", "--block_size", 128, "--learning_rate", 1e-3),
    "sft": ("finetune", "--max_source_length", 64, "--max_target_length", 64, "--learning_rate", 1e-3),
    "rm": ("reward", "--max_source_length", 64, "--max_target_length", 64, "--learning_rate", 1e-3),
}


@pytest.fixture(scope="module")
def run(default_model, tmp_path_factory):
    """run(stage, name, flags): a run of eight steps; its training losses and its held-out loss."""
    root, done = tmp_path_factory.mktemp("runs"), {}

    def train(stage: str, name: str, *flags) -> tuple[list[float], float]:
        if (stage, name) not in done:
            folder, *own = STAGES[stage]
            folders = (
                "--train_file_dir",
                DATA / folder / "train",
                "--validation_file_dir",
                DATA / folder / "validation",
            )
            limits = ("--max_train_samples", 64, "--max_eval_samples", 16, "--max_steps", 8, "--logging_steps", 1)
            common = ("--model_name_or_path", default_model, "--output_dir", root / f"{stage}-{name}")
            batch = ("--per_device_train_batch_size", 4, "--save_strategy", "no", "--lora_dropout", 0.0)
            in_process(SCRIPTS[stage], *common, *folders, *limits, *batch, *own, *flags).ok()
            output = root / f"{stage}-{name}"
            done[stage, name] = history(output, "loss"), results(output)["eval_loss"]
        return done[stage, name]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_learns_as_float32(stage, run):
    """The same batches in the same order: the losses of each step lie beside each other."""
    plain, held_out = run(stage, "plain", *PLAIN)
    fast, fast_held_out = run(stage, "bf16", *PLAIN, "--precision", "bf16")
    assert plain[-1] < plain[0]
    assert fast == pytest.approx(plain, rel=0.02) and fast_held_out == pytest.approx(held_out, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("grouped", ("--train_sampling_strategy", "group_by_length")),
        ("packed", ("--packing", "--packing_length", 256, "--per_device_train_batch_size", 2)),
    ],
)
def test_other_batches_learn_as_much(name, flags, run):
    """Rows of like length together, or several in one: other batches, but as good a model at the end."""
    plain, held_out = run("sft", "plain", *PLAIN)
    fast, fast_held_out = run("sft", name, *PLAIN, *flags)
    assert fast_held_out == pytest.approx(held_out, rel=0.02)
