"""What a run reports as it goes: one line per logging step, with tokens per second, memory and time left."""

import re
import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from loguru import logger
from transformers.trainer_callback import PrinterCallback, ProgressCallback


def peak_memory() -> dict[str, float]:
    """GiB that this process has held at most: {"peak_rss_gib"}, and {"peak_gpu_gib"} where there is a GPU."""
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
    status = Path("/proc/self/status")  # of Linux, where ru_maxrss starts from the parent's peak: a large notebook's
    if found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else ""):
        peak_rss = 2**10 * int(found[1])
    peak = {"peak_rss_gib": round(peak_rss / 2**30, 2)}
    if torch.cuda.is_available():
        peak["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return peak


class Bars(ProgressCallback):
    """The library's progress bars without the dicts that it prints between them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


class LogLine:
    """Mixed into a Trainer: training logs also have seconds per step, tokens per second (of all ranks, without padding
    but where packed rows end) and this rank's peak memory; and each log is printed as one line of name=value."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Bars)
        self.remove_callback(PrinterCallback)
        self._tokens, self._logged = 0, None  # since the last log: tokens; its time and step

    def training_step(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        self.count_tokens(inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def count_tokens(self, tokens) -> None:
        """Call it when a step begins; the first call starts the clock."""
        self._logged = self._logged or (time.perf_counter(), self.state.global_step)
        self._tokens += tokens

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs and self._logged:
            logs |= self.speed()
        super().log(logs, *args, **kwargs)
        logger.info(log_line(self.state.log_history[-1], self.state.max_steps))

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Evaluations and checkpoints do not count: the clock stands still meanwhile."""
        started = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._logged:
            then, step = self._logged  # of before, or of the log just written
            self._logged = then + time.perf_counter() - max(started, then), step

    def speed(self) -> dict[str, float]:
        now, (then, step) = time.perf_counter(), self._logged
        steps = max(1, self.state.global_step - step)
        found = {"step_seconds": (now - then) / steps}
        if self._tokens:
            tokens = self.accelerator.reduce(torch.as_tensor(self._tokens, device=self.args.device))
            found["tokens_per_second"] = tokens.item() / (now - then)
        self._tokens, self._logged = 0, (now, self.state.global_step)
        return found | peak_memory()


def log_line(row: dict[str, float], last: int) -> str:
    """`step 10/60 loss=2.846 ... left=0:01:40` of a row of the log history; numbers have four digits."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    step = shown.pop("step")
    if "step_seconds" in row:
        shown["left"] = timedelta(seconds=round((last - step) * row["step_seconds"]))
    return f"step {step}/{last} " + " ".join(f"{name}={value}" for name, value in shown.items())
