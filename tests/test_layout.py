"""The house rules that a reader relies on: a shared spine, and no imports between scripts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretraining", "supervised_finetuning", "reward_modeling", "rl_training")


# What every stage's main does before it trains, in this order
STEPS = ("parse_arguments(", "set_seed(", "model_args.check(", "resolve_dtype(", "load_tokenizer()", "data_args.load_")
STEPS += ("train_dataset = build_", "eval_dataset = build_", "data_args.preview", "training_args.plan", "model = ")
STEPS += ("avoid_casts(", "trainer = ", "callbacks=training_args.callbacks()")


def test_the_spine_is_the_same_in_every_stage():
    mains = {stage: (ROOT / f"{stage}.py").read_text().split("def main():")[1] for stage in STAGES}
    assert len({main.split("    if training_args.do_train:")[1] for main in mains.values()}) == 1
    for stage, main in mains.items():
        places = [main.find(step) for step in STEPS]
        assert -1 not in places and places == sorted(places), f"{stage}: {dict(zip(STEPS, places, strict=True))}"


@pytest.mark.parametrize("script", [*STAGES, "merge_peft_adapter", "inference"])
def test_scripts_share_only_the_arguments(script):
    own = {path.stem for path in ROOT.glob("*.py")} | {"scripts", "tests", "data"}
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names}
    assert not imported & own
    assert "arguments" in imported
