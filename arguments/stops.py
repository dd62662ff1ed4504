"""What ends a run early but leaves its last checkpoint whole: a signal, or numbers that are not finite."""

import os
import signal
from pathlib import Path

import torch
from loguru import logger
from transformers import PreTrainedModel, TrainerCallback

from arguments.atomic import read_json
from arguments.command_line import Fault, UserError


class StopAtSignal(TrainerCallback):
    """SIGTERM or SIGINT: save a checkpoint, end, exit with 128 + the signal's number. A SIGINT after it exits at once.

    A second SIGTERM does not: when a whole process group gets one, scripts/env.sh forwards it once more.
    """

    def __init__(self, steps_between_saves: int):
        self.signal, self.steps_between_saves = 0, steps_between_saves

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def receive(self, number: int, frame) -> None:
        if self.signal and number == signal.SIGINT:
            os._exit(128 + number)
        if not self.signal:
            self.signal = number
            logger.warning(f"{signal.Signals(number).name}: saving a checkpoint, then ending (Ctrl-C: ending at once)")

    def received(self, args) -> int:
        """The signal that this or another rank got, or 0: all ranks end after the same step."""
        received = torch.tensor(self.signal, device=args.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received)

    def on_step_end(self, args, state, control, **kwargs):
        received = self.received(args)
        if received and state.global_step and state.global_step % self.steps_between_saves == 0:
            self.signal = received
            control.should_save = control.should_training_stop = True

    on_evaluate = on_step_end  # an evaluation may take long; at step 0 there is nothing to save

    def on_train_end(self, args, state, control, **kwargs):
        self.signal = self.received(args)
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal:
            saved = (Path(args.output_dir) / f"checkpoint-{state.global_step}").is_dir()
            then = ": the same command goes on from there" if saved and not args.save_only_model else ""
            logger.warning(f"Ended after step {state.global_step}{then}")
            raise SystemExit(128 + self.signal)


class NamesItsMetric(TrainerCallback):
    """Ends a run whose first evaluation, with --eval_on_start before training, lacks --metric_for_best_model.

    transformers looks for it when it saves one. What reward functions log is not known sooner.
    """

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        asked = args.metric_for_best_model
        found = sorted(name.removeprefix("eval_") for name in metrics if not name.endswith(("runtime", "per_second")))
        if asked and args.eval_strategy != "no" and asked.removeprefix("eval_") not in found:
            known = ", ".join(found)
            raise UserError(f"--metric_for_best_model {asked} is not evaluated here: expected one of {known}")


class EndsOnce:
    """Mixed into a Trainer: a run that is started again goes on with its own weights, or ends with its own figures.

    transformers 5.23 would train one more step if the run ended inside an epoch; and of whole weights it would load
    only those that are called in files as in memory, so none of a mixture's experts.
    """

    def _load_from_checkpoint(self, folder: str, model=None):
        if self.is_fsdp_enabled or not isinstance(self.model, PreTrainedModel):
            return super()._load_from_checkpoint(folder, model)
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or not isinstance(self.model, PreTrainedModel):
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        if self.state.global_step == self._initial_global_step:
            logger.info(f"No step is left of {self.state.max_steps}: the weights stay (--fresh trains anew)")
        self.control.should_training_stop = True

    def save_metrics(self, split: str, metrics: dict, **kwargs):
        if split == "train":
            steps = self.state.global_step - self._initial_global_step
            if getattr(self, "stopped", False):  # by a guard of RL, in a step that moves nothing
                steps -= 1
            if steps <= 0:
                metrics = read_json(Path(self.args.output_dir) / "train_results.json") or metrics
        super().save_metrics(split, metrics, **kwargs)


class FiniteGradients(TrainerCallback):
    """Ends the run before a step whose gradients are not finite, so that no such number reaches a weight.

    In fp16 the loss scale is too high at times: the scaler skips such steps and lowers it. So only three in a row at a
    scale below 1, where lowering no longer helps, end the run; and a run whose steps were all skipped is an error.
    """

    def __init__(self):
        self.in_a_row = self.skipped = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if torch.nn.utils.get_total_norm(gradients).isfinite():
            self.in_a_row = 0
            return
        scaler = optimizer.scaler
        self.skipped += 1
        self.in_a_row += scaler is None or scaler.get_scale() < 1
        if self.in_a_row >= (1 if scaler is None else 3):
            batch = f"batch {state.global_step + 1} (epoch {state.epoch:.3f})"
            raise Fault(
                f"the gradients of {batch} are not finite: nothing of it was learned or saved. Look at its records "
                "with --preview, lower --learning_rate, or try --precision fp32; earlier checkpoints are whole"
            )

    def on_step_end(self, args, state, control, **kwargs):  # before the last checkpoint is saved
        if self.skipped == state.global_step >= state.max_steps:
            raise Fault(
                f"the gradients of all {self.skipped} steps were not finite in fp16: nothing was learned. Take "
                "--fresh and --precision fp32, or more steps: each of these lowered the loss scale by half"
            )


class FiniteWeights(TrainerCallback):
    """Ends the run rather than save a weight that is not finite: a finite gradient may still make a step too large.

    Comes after StopAtSignal, which asks for checkpoints, and before CheckpointSeal. It checks only when something is
    saved: a check at each step costs time and finds nothing that the next step's gradients do not show.
    """

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_save:
            self.check(model, state.global_step)

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, model=None, **kwargs):  # asked for by an evaluation
        self.check(model, state.global_step)

    on_train_end = on_save

    def check(self, model, step: int) -> None:
        if not all(weight.isfinite().all() for weight in model.parameters() if weight.requires_grad):
            raise Fault(
                f"trained weights are not finite after step {step}: they are not saved. Lower --learning_rate; "
                "earlier checkpoints are whole"
            )
