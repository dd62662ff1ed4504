"""How the tests launch the scripts, and the records they launch them on."""

import atexit
import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from loguru import logger

# No network, and one thread: models this small only get slower with more. Set before anything imports torch.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"

SCRIPTS = {
    "pt": "pretraining.py",
    "sft": "supervised_finetuning.py",
    "rm": "reward_modeling.py",
    "rl": "rl_training.py",
}
MERGE = "merge_peft_adapter.py"
# Four prompts, one rollout, eight new tokens; three steps elsewhere. A high rate: adapters of a few steps must matter.
SHORT = {
    "pt": ("--block_size", 32, "--max_steps", 3, "--per_device_train_batch_size", 4, "--learning_rate", 1e-2),
    "sft": ("--max_source_length", 64, "--max_target_length", 32, "--max_steps", 3, "--learning_rate", 1e-2),
    "rm": (*("--max_source_length", 64, "--max_target_length", 32, "--max_steps", 3, "--learning_rate", 1e-2),),
    "rl": (
        *("--max_source_length", 64, "--max_target_length", 8, "--max_steps", 1, "--learning_rate", 1e-2),
        *("--batch_size", 4, "--ppo_epochs", 2, "--max_train_samples", 4),
    ),
}
ADAPTER = "adapter_model.safetensors"

DOCUMENTS = (
    "The heart pumps blood through the body. Blood carries oxygen from the lungs to every organ, and waste away.",
    "Influenza is an infection of the airways. It begins suddenly, with fever, cough and muscle pain.",
    "Asthma narrows the airways. Inhaled medicines open them and calm the inflammation underneath.",
    "High blood pressure is seldom felt. Less salt, more movement and medicines taken daily bring it down.",
    "A sprained ankle swells within minutes. Rest, cold and a bandage help for the first two days.",
    "Iron deficiency makes people tired and pale. The doctor looks for the cause before treating it.",
    "流感是一种呼吸道感染，起病急，常有发热、咳嗽和肌肉疼痛。",
    "高血压往往没有感觉。少吃盐、多运动、每天按时吃药可以把血压降下来。",
)
QUESTIONS = (
    ("What does the heart do?", "It pumps blood through the body.", "It digests food."),
    ("What are the symptoms of influenza?", "Fever, cough and muscle pain that begin suddenly.", "A broken leg."),
    ("How is asthma treated?", "With inhaled medicines that open the airways.", "With cold water, every morning."),
    ("When should I see a doctor?", "At once when breathing is hard.", "Never, it always passes by itself."),
    ("Is high blood pressure felt?", "Seldom, so it should be measured.", "Yes, always, as a pain in the foot."),
    ("What helps a sprained ankle?", "Rest, cold and a bandage.", "Running."),
    ("流感有什么症状？", "发热、咳嗽和肌肉疼痛。", "没有任何症状，不用管。"),
    ("高血压患者平时要注意什么？", "少吃盐，多运动，按时吃药。", "多吃盐。"),
)


def write_lines(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def write_records(root: Path, documents=DOCUMENTS, questions=QUESTIONS) -> Path:
    """One folder a stage under `root`, in the forms of 2023 (and {"prompt"} for stage 4); returns `root`."""
    write_lines(root / "pt", [{"text": text} for text in documents])
    write_lines(root / "sft", [{"instruction": q, "input": "", "output": good} for q, good, _ in questions])
    pairs = [{"question": q, "response_chosen": good, "response_rejected": bad} for q, good, bad in questions]
    write_lines(root / "rm", pairs)
    write_lines(root / "rl", [{"prompt": q} for q, _, _ in questions])
    return root


@dataclass
class Outcome:
    """How a script ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]

    def ok(self) -> "Outcome":
        assert self.code == 0, self.stderr[-3000:]
        return self


def in_process(script: str, *flags) -> Outcome:
    """Run a script as `python script flags` would, but in this process: its main() without ten seconds of imports."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    kept = sys.argv, os.environ.copy(), Path.cwd()
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = [script, *map(str, flags)]
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = kept[0]
        os.environ.clear()
        os.environ.update(kept[1])
        os.chdir(kept[2])
    return Outcome(code, out.getvalue(), err.getvalue())


def in_subprocess(*command, **environment) -> Outcome:
    """Run `python command` from the repository root, as users do."""
    ended = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def stage(name: str, model, data: Path, output: Path, *flags) -> list:
    """Flags of a short run of the stage `name`."""
    folders = ("--train_file_dir", data / name, "--validation_file_dir", data / name, "--keep_duplicates")
    common = ("--model_name_or_path", model, "--output_dir", output, "--max_eval_samples", 4, "--logging_steps", 1)
    return [SCRIPTS[name], *common, *folders, *SHORT[name], *flags]


def merge(base, adapter, output) -> list:
    return [MERGE, "--base_model_name_or_path", base, "--peft_model_path", adapter, "--output_dir", output]


def alone(trainer):
    """A trainer, made without its settings, whose accelerator is that of one process in float32."""
    from accelerate import DistributedType

    kind = {"num_processes": 1, "distributed_type": DistributedType.NO}
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model, **kind)
    return trainer


def results(output: Path) -> dict:
    return json.loads((output / "all_results.json").read_text())


def history(output: Path, key: str) -> list[float]:
    """Every value that the run logged under `key`."""
    rows = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row[key] for row in rows if key in row]


def assert_curves(output: Path, *names: str) -> None:
    for name in names:
        assert (output / f"training_{name}.png").read_bytes().startswith(b"\x89PNG")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, the pipeline before all: a long one at the end would leave a worker idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name != "test_pipeline.py", item.path not in slow))


@pytest.fixture
def logged():
    """The log lines of this test."""
    lines = []
    sink = logger.add(lambda message: lines.append(str(message).strip()), format="{level}: {message}")
    yield lines
    logger.remove(sink)


@pytest.fixture(autouse=True)
def no_tensorboard_folder_of_an_earlier_test(monkeypatch):
    """A stage's arguments name it in the environment, where a test that makes some leaves it."""
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


@pytest.fixture(scope="session")
def default_model() -> str:
    """The real model's folder, made as run_pipeline.sh makes it, by the first worker that asks."""
    MODEL.parent.mkdir(exist_ok=True)
    with FileLock(MODEL.parent / ".lock"):
        subprocess.run([sys.executable, "scripts/get_default_model.py", str(MODEL)], cwd=ROOT, check=True)
    return str(MODEL)


@pytest.fixture(scope="session")
def warm_python():
    """A python that starts scripts within a third of a second: warm_python.py says what it cannot stand for."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # the other one would bar forks from a GPU
        command = [sys.executable, ROOT / "tests" / "warm_python.py", folder]
        server = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            while not (Path(folder) / "python").exists():
                assert server.poll() is None, "it did not start"
                time.sleep(0.1)
            yield f"{folder}/python"
        finally:
            os.killpg(server.pid, signal.SIGKILL)  # with what is left of its forks
            server.wait()


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> Path:
    """Folders pt, sft, rm and rl of eight English and Chinese records each."""
    return write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(family): the folder of a small random model, made once."""
    from tiny_models import save_tiny

    root, made = tmp_path_factory.mktemp("models"), {}

    def build(family: str) -> str:
        if family not in made:
            made[family] = save_tiny(family, root / family)
        return made[family]

    return build
