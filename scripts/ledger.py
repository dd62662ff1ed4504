"""The pipeline's ledger: what each stage ran with, when, for how long, and its results.

    python scripts/ledger.py start outputs sft scripts/run_sft.sh outputs/pt-merged data/finetune -- --max_steps 30
    python scripts/ledger.py finish outputs sft
    python scripts/ledger.py clear outputs

start   reads the stage's inputs (files; folders of models or data; anything else is a name) and flags, and prints
        "ended" if it ended with just these, "begun" if it was begun with them, "changed" if it was run with others
        (which: to stderr; what it made then is deleted), "new" if it was never run. What another command has put in
        the place of what it made ends the pipeline.
finish  adds the stage's figures and time.
clear   deletes all stages' folders, unless a run is writing into one.
Writes  outputs/ledger.jsonl: a line when a stage begins and one when it ends. Of several machines (NODE_RANK) the
        first one writes, and starts over what changed.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments.atomic import append_lines, hold_folder, read_lines  # noqa: E402
from arguments.files import all_files, find_files  # noqa: E402

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
WEIGHTS = (".safetensors", ".bin")
LOADED = (  # in a model's folder: other files there (a report, figures, notes) do not affect a stage
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*model*.bin",
    "*.index.json",
    "adapter_*",
    "base.json",
    "*token*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "*.py",
)
FOLLOWS = os.environ.get("NODE_RANK", "0") != "0"


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files; of a model's, those that loading reads."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    loaded = sorted({file for pattern in LOADED for file in path.glob(pattern) if file.is_file()})
    names = {file.name for file in loaded}
    is_model = names & {"config.json", "adapter_config.json"} and any(name.endswith(WEIGHTS) for name in names)
    files = loaded if is_model else find_files(path) or all_files(path)  # notes beside the data do not, either
    rows = [f"{file.relative_to(path)} {digest(file)}" for file in files]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def entries(outputs: Path, stage: str) -> list[dict]:
    """What the ledger holds of a stage."""
    return [row for row in read_lines(outputs / "ledger.jsonl") if row["stage"] == stage]


def present(outputs: Path, stage: str) -> bool:
    """Whether what the stage made is still there."""
    if stage in ("quiz", "perplexity"):  # they leave figures only
        return (outputs / f"{stage}.json").exists()
    adapter = (outputs / stage / "adapter_config.json").exists()
    model = outputs / (f"{stage}-merged" if adapter else stage)
    whole = (model / "config.json").exists() and any(model.glob("*.safetensors"))
    return whole and (outputs / stage / "all_results.json").exists()


def result_of(outputs: Path, stage: str) -> str | None:
    """Hash of the adapter or model that a stage made; None for those that leave figures only."""
    return digest(outputs / stage) if (outputs / stage).is_dir() else None


def content(name: str) -> str:
    """Hash of an input's content; several folders may be joined as in --train_file_dir, a,b:2."""
    if Path(name).exists():
        return digest(Path(name))
    parts = [part if Path(part).exists() else part.rpartition(":")[0] for part in name.split(",")]
    if all(part and Path(part).exists() for part in parts):
        return " ".join([name, *(digest(Path(part)) for part in parts)])
    return name


def without_secrets(flags: list[str]) -> list[str]:
    """The flags with tokens masked. What masks them is slow to import, so only if there may be one."""
    if not any("token" in flag.lower() for flag in flags):
        return flags
    from arguments.command_line import without_secrets as masked

    return masked(flags)


def start(outputs: Path, stage: str, inputs: list[str], flags: list[str]) -> str:
    """Add a line for a stage that begins, unless it has ended with the same inputs; returns the word to print."""
    flags = without_secrets(flags)
    made = {name: content(name) for name in inputs}
    known = entries(outputs, stage)
    last = known[-1] if known else {"inputs": {}, "flags": flags}
    before = [*last["inputs"].values(), *[None] * len(made)]
    changed = [name for (name, now), then in zip(made.items(), before, strict=False) if now != then]
    changed += ["the flags"] * (flags != last["flags"])
    if known and not changed and last["event"] == "finish" and present(outputs, stage):
        if last.get("result") not in (None, result_of(outputs, stage)):
            print(
                f"error: {outputs / stage} holds what another command has made since the pipeline did: move it and "
                f"{stage}-merged elsewhere, or set OUTPUTS",
                file=sys.stderr,
            )
            sys.exit(2)
        return "ended"
    if FOLLOWS:
        return "new"
    if known and changed:
        print(f"{stage}: {', '.join(changed)} changed since it was run last: it starts over", file=sys.stderr)
        clear([outputs / stage, outputs / f"{stage}-merged"])
    versions = {name: version(name) for name in PACKAGES}
    row = {"stage": stage, "event": "start", "time": time.time(), "inputs": made, "flags": flags, "versions": versions}
    append_lines(outputs / "ledger.jsonl", [row])
    return "new" if not known else "changed" if changed else "begun"


def clear(folders: list[Path]) -> None:
    """Remove folders, unless another run is writing into one of them."""
    folders = [folder for folder in folders if folder.is_dir()]
    for folder in folders:
        if not hold_folder(folder):
            print(f"error: {folder}: another run is writing there. Wait for its end, or set OUTPUTS", file=sys.stderr)
            sys.exit(2)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def finish(outputs: Path, stage: str) -> None:
    """Add a line for a stage that has ended, with the figures of all_results.json."""
    if FOLLOWS:
        return
    last = entries(outputs, stage)[-1]
    results = outputs / stage / "all_results.json"
    figures = json.loads(results.read_text()) if results.exists() else {}
    seconds = round(time.time() - last["time"], 1)
    last |= {"event": "finish", "time": time.time(), "seconds": seconds, "figures": figures}
    last["result"] = result_of(outputs, stage)
    append_lines(outputs / "ledger.jsonl", [last])


def main():
    event, outputs, *rest = sys.argv[1:]
    if event == "clear":
        return clear([*Path(outputs).glob("*")])
    stage, *rest = rest
    if event == "finish":
        return finish(Path(outputs), stage)
    split = rest.index("--") if "--" in rest else len(rest)
    try:
        print(start(Path(outputs), stage, rest[:split], rest[split + 1 :]))
    except PermissionError as error:
        print(f"error: {error.filename}: this user lacks the permission. Grant it, or name another", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
