"""The house rules that a reader relies on: a shared spine, and no imports between scripts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretraining", "supervised_finetuning", "reward_modeling", "rl_training")


def test_the_spine_is_the_same_in_every_stage():
    tails = {(ROOT / f"{stage}.py").read_text().split("    if training_args.do_train:")[1] for stage in STAGES}
    heads = {(ROOT / f"{stage}.py").read_text().split("def main():")[1].count("set_seed(") for stage in STAGES}
    assert len(tails) == 1
    assert heads == {1}


@pytest.mark.parametrize("script", [*STAGES, "merge_peft_adapter", "inference"])
def test_scripts_share_only_the_arguments(script):
    own = {path.stem for path in ROOT.glob("*.py")} | {"scripts", "tests", "data"}
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names}
    assert not imported & own
    assert "arguments" in imported
