"""The pipeline's ledger: a stage whose inputs changed runs again, the others do not, and a kill costs nothing."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

from arguments import atomic
from arguments.files import all_files
from scripts.ledger import act, clear, digest, finish, main, start


@pytest.fixture
def house(tmp_path):
    """outputs/ with what two stages made, a model and a data folder; and the words that start() prints for them."""
    outputs, model, data = tmp_path / "outputs", tmp_path / "model", tmp_path / "data"
    for folder in (outputs / "pt", outputs / "sft", model, data / "train"):
        folder.mkdir(parents=True)
    for folder in (outputs / "pt", outputs / "sft", model):
        (folder / "config.json").write_text("{}")
        (folder / "all_results.json").write_text('{"eval_loss": 2.5}')
        (folder / "model.safetensors").write_bytes(b"x")
    (data / "train" / "a.txt").write_text("one")
    (tmp_path / "big" / "deeper").mkdir(parents=True)
    (tmp_path / "big" / "a.txt").write_text("one")
    (tmp_path / "big" / "deeper" / "back").symlink_to(tmp_path / "big")
    (data / "train" / "big").symlink_to(tmp_path / "big")
    return outputs, model, data


def begin(house, stage="pt", flags=("--seed", "1"), extra=()):
    outputs, model, data = house
    return start(outputs, stage, [str(model), str(data), *extra], list(flags))


def rows(outputs) -> list[dict]:
    return [json.loads(line) for line in (outputs / "ledger.jsonl").read_text().splitlines()]


def test_a_stage_runs_once(house):
    outputs = house[0]
    assert begin(house) == "new"
    finish(outputs, "pt")
    assert begin(house) == "ended"
    assert begin(house, "sft") == "new", "the other stage has its own lines"
    assert [(row["stage"], row["event"]) for row in rows(outputs)] == [
        ("pt", "start"),
        ("pt", "finish"),
        ("sft", "start"),
    ]
    ended = rows(outputs)[1]
    assert ended["figures"] == {"eval_loss": 2.5} and ended["seconds"] >= 0 and ended["flags"] == ["--seed", "1"]


def test_what_another_command_made_in_a_stages_place_is_not_taken_for_it(house):
    outputs = house[0]
    begin(house)
    finish(outputs, "pt")
    (outputs / "pt" / "all_results.json").write_text('{"eval_loss": 2.5, "eval_runtime": 3}')  # evaluated once more
    assert begin(house) == "ended"
    (outputs / "pt" / "model.safetensors").write_bytes(b"y")
    with pytest.raises(ValueError, match="/pt is not what the pipeline made.*, and pt-merged with it"):
        begin(house)
    assert (outputs / "pt" / "model.safetensors").read_bytes() == b"y" and len(rows(outputs)) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "chat_template.jinja"])
def test_a_damaged_merged_model_is_told_from_a_new_one(house, name):
    """Later stages would start over, on a model that nobody made."""
    outputs, merged = house[0], house[0] / "pt-merged"
    shutil.copytree(house[1], merged)
    (outputs / "pt" / "adapter_config.json").write_text("{}")
    (merged / "chat_template.jinja").write_text("{{ messages }}")
    begin(house)
    finish(outputs, "pt")
    assert begin(house) == "ended"
    (merged / name).write_bytes(b"")
    with pytest.raises(ValueError, match="/pt-merged is not what the pipeline made.* Move it elsewhere, or"):
        begin(house)
    shutil.rmtree(merged)
    assert begin(house) == "begun", "it is merged again"


def test_the_order_of_an_adapters_sets_is_nothing_new(house):
    outputs, adapter = house[0], house[0] / "rm"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    found = []
    for targets in (["q", "v"], ["v", "q"], ["v", "k"]):
        (adapter / "adapter_config.json").write_text(json.dumps({"target_modules": targets, "r": 8}))
        found.append(digest(adapter))
    assert found[0] == found[1] != found[2]
    (outputs / "rm" / "adapter_config.json").write_text("{")
    assert digest(adapter) not in found


def test_a_look_writes_and_deletes_nothing(house):
    outputs, model, data = house
    looks = [str(model), str(data)], ["--seed", "1"], True
    assert start(outputs, "pt", *looks) == "new" and not (outputs / "ledger.jsonl").exists()
    begin(house)
    finish(outputs, "pt")
    assert start(outputs, "pt", *looks) == "ended"
    (data / "train" / "a.txt").write_text("two")
    assert start(outputs, "pt", *looks) == "changed"
    assert (outputs / "pt" / "config.json").exists() and len(rows(outputs)) == 2


@pytest.mark.parametrize("said", ["No space left on device", "Read-only file system"])
def test_a_disk_that_cannot_be_written_to_is_said_in_one_line(house, monkeypatch, capsys, said):
    outputs, model, data = house

    def fails(*_):
        raise OSError(28, said)

    monkeypatch.setattr("scripts.ledger.append_lines", fails)
    monkeypatch.setattr("sys.argv", ["ledger.py", "start", str(outputs), "pt", str(model), str(data)])
    with pytest.raises(SystemExit) as ended:
        main()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and len(lines) == 1 and said in lines[0]


def test_a_damaged_line_is_named(house, monkeypatch, capsys):
    outputs, model, data = house
    begin(house)
    (outputs / "ledger.jsonl").write_text('{"stage": "pt", "ev\n' + (outputs / "ledger.jsonl").read_text())
    monkeypatch.setattr("sys.argv", ["ledger.py", "start", str(outputs), "pt", str(model), str(data)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "ledger.jsonl:1 is not JSON" in capsys.readouterr().err


def test_a_stage_that_was_killed_goes_on(house):
    assert [begin(house), begin(house)] == ["new", "begun"]


FILES_OF_A_MODEL = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "vocab.txt",
    "chat_template.jinja",
    "base.json",
)


@pytest.mark.parametrize("what", ["data", "new file", "linked file", *FILES_OF_A_MODEL, "flags", "name"])
def test_a_change_starts_it_over(house, what, capsys):
    outputs, model, data = house
    begin(house, extra=["hub/name"])
    finish(outputs, "pt")
    if what == "data":
        (data / "train" / "a.txt").write_text("two")
    if what == "new file":
        (data / "train" / "b.txt").write_text("one")
    if what == "linked file":
        (data / "train" / "big" / "a.txt").write_text("two")
    if what in FILES_OF_A_MODEL:
        (model / what).write_text("two")
    extra = ["hub/other" if what == "name" else "hub/name"]
    assert begin(house, flags=["--seed", "2" if what == "flags" else "1"], extra=extra) == "changed"
    assert "changed since it was run last" in capsys.readouterr().err
    finish(outputs, "pt")


@pytest.mark.parametrize(
    "where", ["report.html", "model.gguf", ".DS_Store", "notes.md", "runs/events", "training_args.bin"]
)
def test_what_no_stage_reads_changes_nothing(house, where):
    """scripts/page.py leaves report.html in a stage's folder, macOS and notebooks hide files among the data."""
    outputs, model, data = house
    (outputs / "rm").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (outputs / "rm" / name).write_text("{}")
    begin(house, extra=[str(outputs / "rm")])
    finish(outputs, "pt")
    hidden = (data / "train" / ".DS_Store", data / "train" / ".ipynb_checkpoints" / "a-checkpoint.txt")
    for path in (model / where, outputs / "rm" / where, *hidden):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert begin(house, extra=[str(outputs / "rm")]) == "ended"


def test_a_folder_that_cannot_be_listed(house, monkeypatch, capsys):
    outputs, model, data = house

    def shut(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", shut)
    monkeypatch.setattr("sys.argv", ["ledger.py", "start", str(outputs), "pt", str(model), str(data)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith(f"error: {data}: ") and not (outputs / "ledger.jsonl").exists()


@pytest.mark.parametrize("flags", [("--hub-token", "hf_secret"), ("--hub_token=hf_secret", "--seed", "2")])
def test_no_token_is_kept(house, flags):
    outputs = house[0]
    begin(house, flags=flags)
    finish(outputs, "pt")
    assert "hf_secret" not in (outputs / "ledger.jsonl").read_text()
    assert begin(house, flags=flags) == "ended"


def test_what_another_run_is_writing_is_not_deleted(house, monkeypatch):
    outputs = house[0]
    begin(house)
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    other = os.open(outputs / "pt", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    for deletes in (lambda: begin(house, flags=["--seed", "2"]), lambda: clear([outputs / "sft", outputs / "pt"])):
        with pytest.raises(ValueError, match="pt: another run is writing there"):
            deletes()
        assert (outputs / "pt" / "config.json").exists() and (outputs / "sft").exists()
    os.close(other)
    assert begin(house, flags=["--seed", "2"]) == "changed" and not (outputs / "pt").exists()


def test_one_pipeline_at_a_time(house, monkeypatch):
    """Its lock lasts as long as the descriptor that the script has opened, though this process ends."""
    outputs = house[0]
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    first, second = (os.open(outputs, os.O_RDONLY) for _ in range(2))
    act("hold", str(outputs), str(first))
    with pytest.raises(ValueError, match="another pipeline is running there"):
        act("hold", str(outputs), str(second))
    os.close(first)
    act("hold", str(outputs), str(second))
    os.close(second)


def test_a_note_beside_the_data_changes_nothing(house):
    outputs, _, data = house
    begin(house)
    finish(outputs, "pt")
    (data / "NOTES.md").write_text("a note")
    assert begin(house) == "ended"


def test_figures_that_were_cut_are_made_again(house):
    outputs = house[0]
    begin(house)
    finish(outputs, "pt")
    (outputs / "pt" / "all_results.json").write_text('{"eval_loss": ')
    assert begin(house) == "begun"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_gone_is_made_again(name, house):
    outputs = house[0]
    begin(house)
    finish(outputs, "pt")
    (outputs / "pt" / name).unlink()
    assert begin(house) == "begun"


def test_a_line_cut_short_by_a_kill(house):
    outputs = house[0]
    begin(house)
    with (outputs / "ledger.jsonl").open("ab") as file:
        file.write('{"stage": "pt", "event": "完'.encode()[:-1])
    assert begin(house) == "begun"
    finish(outputs, "pt")
    assert begin(house) == "ended"


def test_digest_knows_names_and_what_lies_below(tmp_path):
    (tmp_path / "a").write_text("x")
    first = digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    second = digest(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log").write_text("x")
    third = digest(tmp_path)
    assert len({first, second, third}) == 3
    (tmp_path / "config.json").write_text("{}")
    assert digest(tmp_path) not in (first, second, third), "without weights it is not a model"
    (tmp_path / "model.safetensors").write_text("x")
    with_log = digest(tmp_path)
    (tmp_path / "runs" / "log").write_text("changed")
    assert digest(tmp_path) == with_log, "of a model folder only the top level counts, not its logs"


def test_the_files_of_a_data_folder(tmp_path):
    """For the ledger and for training alike: none that is hidden, and none twice for a link that leads back."""
    for name in ("a/b.txt", "a/.b.txt", ".hidden/c.txt", "a.txt", "other/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path)
    found = all_files(tmp_path)
    assert tmp_path / "a" / "link" / "d.txt" in found and len(found) == 4
