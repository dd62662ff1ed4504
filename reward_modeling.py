r"""Stage 3: reward modeling, to score answers as people would.

    python reward_modeling.py --model_name_or_path outputs/sft-merged --train_file_dir data/reward/train \
        --validation_file_dir data/reward/validation --output_dir outputs/rm

Reads   pairs of a chosen and a rejected answer in any of the forms of data/README.md.
Trains  a LoRA adapter and a score head (--use_peft False: all weights) so that chosen scores above rejected.
Writes  the adapter with its head, tokenizer, metrics (held-out accuracy, margin, and the accuracy of "the longer
        answer wins") and curves into output_dir.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel, TaskType
from torch.utils.data import SequentialSampler
from transformers import AutoModelForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer

from arguments.adapter import AdapterArguments, cast_trained
from arguments.answers import win_rate
from arguments.atomic import append_step
from arguments.command_line import UserError, expect, parse_arguments, run_stage
from arguments.data import DataArguments
from arguments.loss import own_rows
from arguments.model import ModelArguments
from arguments.order import STRATEGIES, SeededOrder
from arguments.pairs import collate_pairs, score_pairs, shared_tokens, shares_prompts, with_length
from arguments.plan import plan_pairs
from arguments.run import RunArguments
from arguments.stops import EndsOnce
from arguments.telemetry import LogLine

ELSEWHERE = {  # flags of trl whose work is done before its trainer could: why, and what to give
    "max_length": "question and answers have limits of their own: give --max_source_length and --max_target_length",
    "chat_template_path": "records are encoded with the tokenizer's template: give --tokenizer_name_or_path",
    "eos_token": "records are encoded with the tokenizer's end tokens: give --tokenizer_name_or_path",
    "pad_token": "batches are padded with the tokenizer's pad token: give --tokenizer_name_or_path",
    "dataset_num_proc": "records are encoded by this project: give --preprocessing_num_workers",
    "model_init_kwargs": "the model is loaded as flags of their own say: --dtype, --attn_implementation, --device_map",
}


@dataclass
class RewardArguments(RunArguments, RewardConfig):
    """trl.RewardConfig with this project's defaults."""

    metrics = {"loss": False, "accuracy": True, "accuracy_*": True, "margin": True}

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak rate. 2e-4 suits LoRA; all weights want 1e-5."})
    max_length: int | None = field(
        default=None, metadata={"help": "Not to be set: the limits are max_source_length and max_target_length."}
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "By length, pairs of a batch need little padding.", "choices": STRATEGIES},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "The sampler above reads a column, length."})
    center_rewards_coefficient: float | None = field(
        default=0.01, metadata={"help": "Keeps scores around 0, so that PPO's rewards are."}
    )

    def __post_init__(self):
        for flag, instead in ELSEWHERE.items():
            if (value := getattr(self, flag)) is not None:
                raise UserError(f"--{flag} is {value}, but {instead}")
        expect(self, "a number from 0 on", lambda x: 0 <= x < math.inf, "center_rewards_coefficient")
        super().__post_init__()
        if self.activation_offloading and self.use_cpu:
            raise UserError("--activation_offloading moves activations from a GPU, and none is used: leave it out")

    def check_kinds(self, kinds: list[str]) -> None:
        """Refuse to go by the accuracy of a kind of pairs that none of the held-out ones, of these `kinds`, is of."""
        asked = (self.metric_for_best_model or "").removeprefix("eval_") if self.eval_strategy != "no" else ""
        if asked.startswith("accuracy_") and asked.removeprefix("accuracy_") not in kinds:
            names = ", ".join(sorted({f"eval_accuracy_{kind}" for kind in kinds if kind})) or "eval_accuracy alone"
            raise UserError(f"--metric_for_best_model {asked}: no held-out pair is of that kind, expected {names}")


def build_dataset(rows: Dataset, tokenizer, data_args: DataArguments) -> Dataset:
    """Rows {"chosen_ids", "rejected_ids", "length", "together"}: the conversation with each answer up to its end,
    the length of the longer one, and that of one row with both answers after a single prompt.

    A pair whose answers differ only beyond max_target_length is a bad record: nothing can be learned from it.
    """

    def encode(row):
        answers = [{"role": "assistant", "content": row[name]} for name in ("chosen", "rejected")]
        chosen, rejected = (data_args.encode(tokenizer, [*row["prompt"], answer]) for answer in answers)
        ids = {"chosen_ids": chosen["input_ids"], "rejected_ids": rejected["input_ids"]}
        if ids["chosen_ids"] == ids["rejected_ids"]:
            raise UserError(
                f"chosen and rejected are the same up to --max_target_length {data_args.max_target_length}"
            )
        lengths = {name: chosen[name] for name in ("source_tokens", "source_kept")}
        lengths |= {"chosen_tokens": chosen["target_tokens"], "rejected_tokens": rejected["target_tokens"]}
        lengths |= {f"{name}_characters": len(row[name]) for name in ("chosen", "rejected")}
        together = sum(map(len, ids.values())) - shared_tokens(*ids.values())
        return ids | lengths | {"length": max(map(len, ids.values())), "together": together}

    return data_args.tokenize(rows, encode, tokenizer, keep=("kind", "place"))


def accuracies(margins: torch.Tensor, kinds: list[str]) -> dict[str, float]:
    """Share of pairs whose chosen answer scores higher, of all and of each named kind; ties count half."""
    right = (margins > 0).float() + 0.5 * (margins == 0).float()
    found = {"accuracy": right.mean().item(), "margin": margins.mean().item()}
    for kind in sorted(set(kinds) - {""}):
        found[f"accuracy_{kind}"] = right[[other == kind for other in kinds]].mean().item()
    return found


class PairTrainer(LogLine, EndsOnce, SeededOrder, RewardTrainer):
    """trl.RewardTrainer with exact held-out figures, also by kind of rejected answer, and the length-only accuracy.

    The library averages over batches: pairs of a small last batch weigh more, and with several processes the pairs
    that fill it up count twice. In training, too, each pair of a step weighs the same, and none counts twice.
    """

    loss_is_scaled_for_ga = True  # by the number of pairs in a step

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # sorted by length already; a shuffled one would mix up the kinds

    def evaluate(self, *args, **kwargs):
        self.scores = []
        return super().evaluate(*args, **kwargs)

    def get_batch_samples(self, *args, **kwargs):
        """Batches of a step, and the number of pairs in it on all ranks, without those that fill up the last batch."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            batch["own"] = len(batch["spans"]) if "spans" in batch else len(batch["input_ids"]) // 2
        batches[-1]["own"] = own_rows(self, batches[-1]["own"])
        own = torch.tensor(sum(batch["own"] for batch in batches), device=self.args.device)
        return batches, self.accelerator.reduce(own)

    def losses(self, scores: torch.Tensor) -> torch.Tensor:
        """The loss of each pair, of scores [pairs, chosen and rejected]."""
        centering = (self.args.center_rewards_coefficient or 0) * scores.sum(dim=1).square()
        return centering - torch.nn.functional.logsigmoid(scores[:, 0] - scores[:, 1])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        scored, own = model, inputs.pop("own", None)
        if "spans" in inputs:
            inner = self.accelerator.unwrap_model(model)
            scored = partial(score_pairs, model, inner.get_base_model() if isinstance(inner, PeftModel) else inner)
        # trl scores the pairs and keeps its metrics; its loss, a mean over this batch alone, is replaced below
        loss, outputs = super().compute_loss(scored, inputs, return_outputs=True)
        pairs = torch.stack(outputs.logits.float().flatten().chunk(2), dim=1)  # [pairs, chosen and rejected]
        if model.training:
            loss = self.losses(pairs[:own]).sum() * self.accelerator.num_processes / num_items_in_batch
        else:
            self.scores.append(self.accelerator.gather_for_metrics(pairs).cpu())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "eval_loss" in logs:
            scores, kinds = torch.cat(self.scores), self.eval_dataset["kind"][:]
            logs |= {f"eval_{name}": value for name, value in self.held_out_figures(scores, kinds).items()}
            self.write_margins(scores, kinds)
            self._metrics["eval"].clear()  # trl would log its own over ours: means over batches
        super().log(logs, *args, **kwargs)

    def held_out_figures(self, scores: torch.Tensor, kinds: list[str]) -> dict[str, float]:
        """Of scores [pairs, chosen and rejected]: loss, accuracies, margin, share of longer winners, range."""
        figures = accuracies(scores[:, 0] - scores[:, 1], kinds) | {"loss": self.losses(scores).mean().item()}
        for unit, name in (("tokens", "longer_wins"), ("characters", "longer_wins_characters")):
            figures[name] = win_rate(*(self.eval_dataset[f"{side}_{unit}"][:] for side in ("chosen", "rejected")))
        figures |= {f"{name}_reward": getattr(scores, name)().item() for name in ("min", "mean", "max")}
        return figures | {"pairs": len(scores)}

    def write_margins(self, scores: torch.Tensor, kinds: list[str]) -> None:
        """Add this evaluation to margins.jsonl, which scripts/page.py plots: margin, kind and place of each pair."""
        if self.is_world_process_zero():
            margins, places = (scores[:, 0] - scores[:, 1]).tolist(), self.eval_dataset["place"][:]
            line = {"step": self.state.global_step, "margins": margins, "kinds": kinds, "places": places}
            append_step(Path(self.args.output_dir) / "margins.jsonl", [line])


def main():
    model_args, adapter_args, data_args, training_args = parse_arguments(
        ModelArguments, AdapterArguments, DataArguments, RewardArguments
    )
    set_seed(training_args.seed)
    model_args.check(data_args.longest, trains_all=not adapter_args.use_peft, output_dir=training_args.output_dir)
    model_args.resolve_dtype(training_args.precision, trains_all=not adapter_args.use_peft)
    training_args.disable_dropout &= not adapter_args.lora_dropout  # trl's True would take LoRA's away as well

    tokenizer = model_args.load_tokenizer()
    train_rows, eval_rows = data_args.load_pairs(training_args.output_dir)
    training_args.check_kinds(eval_rows["kind"][:])
    train_dataset = build_dataset(train_rows, tokenizer, data_args)
    eval_dataset = build_dataset(eval_rows, tokenizer, data_args)
    if data_args.preview:
        return data_args.show(train_dataset, tokenizer)
    if training_args.plan:
        groups = model_args, adapter_args, training_args
        return plan_pairs(*groups, train_dataset, eval_dataset, tokenizer, data_args.longest)

    model = model_args.load_model(AutoModelForSequenceClassification, num_labels=1)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    shared = shares_prompts(model, training_args, train_dataset, data_args.longest)
    train_dataset = with_length(train_dataset, shared)
    eval_dataset = with_length(eval_dataset, shared).sort("length")  # less padding
    model = adapter_args.apply(model, TaskType.SEQ_CLS)
    training_args.avoid_casts(model)
    training_args.compile_layers(model)

    trainer = PairTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=partial(collate_pairs, pad_token_id=tokenizer.pad_token_id) if shared else None,
        callbacks=training_args.callbacks(),
    )
    cast_trained(trainer.model)  # trl casts what trains on a quantised base to bfloat16
    if training_args.do_train:
        sources = model_args.model_name_or_path, adapter_args.adapter_path
        result = trainer.train(resume_from_checkpoint=training_args.checkpoint(*sources))
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_model()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    training_args.finish(trainer, data_args)


if __name__ == "__main__":
    run_stage(main)
