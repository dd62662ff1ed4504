"""The pipeline's ledger: what each stage ran with, when, for how long, and its results.

    python scripts/ledger.py look outputs sft scripts/run_sft.sh outputs/pt-merged data/finetune -- --max_steps 30
    python scripts/ledger.py start outputs sft scripts/run_sft.sh outputs/pt-merged data/finetune -- --max_steps 30
    python scripts/ledger.py finish outputs sft
    python scripts/ledger.py clear outputs
    python scripts/ledger.py hold outputs 9 9<outputs

start   reads the stage's inputs (files; folders of models or data; anything else is a name) and flags, and prints
        "ended" if it ended with just these, "begun" if it was begun with them, "changed" if it was run with others
        (which: to stderr; what it made then is deleted), "new" if it was never run. What another command has put in
        the place of what it made ends the pipeline.
look    says what start would, and writes and deletes nothing.
finish  adds the stage's figures and time.
clear   deletes all that is in outputs, unless a run is writing into a folder there.
hold    keeps other pipelines out of the folder until all processes with this descriptor of it have ended.
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
from arguments.atomic import append_lines, hold_folder, lock, read_json, read_lines  # noqa: E402
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
    if path.name == "adapter_config.json":  # peft writes its sets in any order
        return hashlib.sha256(json.dumps(in_order(read_json(path)), sort_keys=True).encode()).hexdigest()
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    loaded = sorted({file for pattern in LOADED for file in path.glob(pattern) if file.is_file()})
    names = {file.name for file in loaded}
    is_model = names & {"config.json", "adapter_config.json"} and any(name.endswith(WEIGHTS) for name in names)
    files = loaded if is_model else find_files(path) or all_files(path)  # notes beside the data do not, either
    rows = [f"{file.relative_to(path)} {digest(file)}" for file in files]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def in_order(value):
    """JSON with the texts of each list sorted."""
    if isinstance(value, dict):
        return {key: in_order(one) for key, one in value.items()}
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return sorted(value) if texts else value


def entries(outputs: Path, stage: str) -> list[dict]:
    """What the ledger holds of a stage."""
    return [row for row in read_lines(outputs / "ledger.jsonl") if row["stage"] == stage]


def present(outputs: Path, stage: str) -> bool:
    """Whether what the stage made is still there, and its figures are whole."""
    if stage in ("quiz", "perplexity"):  # they leave figures only
        return read_json(outputs / f"{stage}.json") is not None
    adapter = (outputs / stage / "adapter_config.json").exists()
    model = outputs / (f"{stage}-merged" if adapter else stage)
    whole = (model / "config.json").exists() and any(model.glob("*.safetensors"))
    return whole and read_json(outputs / stage / "all_results.json") is not None


def results_of(outputs: Path, stage: str) -> dict[str, str]:
    """Hashes of the adapter or model that a stage made and of the merged model, by their folders' names."""
    return {name: digest(outputs / name) for name in (stage, f"{stage}-merged") if (outputs / name).is_dir()}


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


def start(outputs: Path, stage: str, inputs: list[str], flags: list[str], look: bool = False) -> str:
    """Add a line for a stage that begins, unless it has ended with the same inputs; returns the word to print.

    With `look` nothing is written or deleted.
    """
    flags = without_secrets(flags)
    made = {name: content(name) for name in inputs}
    known = entries(outputs, stage)
    last = known[-1] if known else {"inputs": {}, "flags": flags}
    before = [*last["inputs"].values(), *[None] * len(made)]
    changed = [name for (name, now), then in zip(made.items(), before, strict=False) if now != then]
    changed += ["the flags"] * (flags != last["flags"])
    state = "new" if not known else "changed" if changed else "begun"
    if state == "begun" and last["event"] == "finish" and present(outputs, stage):
        found = results_of(outputs, stage)
        if other := [name for name, then in last.get("results", {}).items() if found.get(name, then) != then]:
            rest = "" if other == [f"{stage}-merged"] else f", and {stage}-merged with it"  # else it is merged again
            raise ValueError(
                f"{outputs / other[0]} is not what the pipeline made: it is damaged, or another command changed it. "
                f"Move it elsewhere{rest}, or set OUTPUTS"
            )
        return "ended"
    if look:
        return state
    if FOLLOWS:
        return "new"
    if state == "changed":
        print(f"{stage}: {', '.join(changed)} changed since it was run last: it starts over", file=sys.stderr)
        clear([outputs / stage, outputs / f"{stage}-merged"])
    versions = {name: version(name) for name in PACKAGES}
    row = {"stage": stage, "event": "start", "time": time.time(), "inputs": made, "flags": flags, "versions": versions}
    append_lines(outputs / "ledger.jsonl", [row])
    return state


def hold(outputs: Path, descriptor: int) -> None:
    """Keep other pipelines out of a folder that the calling script has opened under this number, until it ends."""
    if not lock(descriptor):
        raise ValueError(f"{outputs}: another pipeline is running there. Wait for its end, or set OUTPUTS")


def clear(folders: list[Path]) -> None:
    """Remove folders, unless another run is writing into one of them."""
    folders = [folder for folder in folders if folder.is_dir()]
    for folder in folders:
        if not hold_folder(folder):
            raise ValueError(f"{folder}: another run is writing there. Wait for its end, or set OUTPUTS")
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
    last["results"] = results_of(outputs, stage)
    append_lines(outputs / "ledger.jsonl", [last])


def act(event: str, outputs: str, stage: str = "", *rest: str) -> None:
    """What the command line asks for."""
    folder, split = Path(outputs), rest.index("--") if "--" in rest else len(rest)
    if event == "hold":
        hold(folder, int(stage))
    elif event == "clear":
        clear([*folder.iterdir()])
        for file in folder.iterdir():
            file.unlink()
    elif event == "finish":
        finish(folder, stage)
    else:
        print(start(folder, stage, list(rest[:split]), list(rest[split + 1 :]), look=event == "look"))


def main():
    try:
        act(*sys.argv[1:])
    except PermissionError as error:
        print(f"error: {error.filename}: this user lacks the permission. Grant it, or name another", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of a disk that is full or cannot be written to
        print(f"error: cannot write or read: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
