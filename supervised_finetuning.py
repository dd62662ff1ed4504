r"""Stage 2: supervised fine-tuning, to answer instructions and hold conversations.

    python supervised_finetuning.py --model_name_or_path outputs/pt-merged --train_file_dir data/finetune/train \
        --validation_file_dir data/finetune/validation --output_dir outputs/sft

Reads   conversations in any of the forms of data/README.md.
Trains  a LoRA adapter (--use_peft False: all weights) on the assistant's turns and the tokens that end them
        (--train_on_inputs: on all turns).
Writes  the adapter, tokenizer, metrics (held-out loss of the answers) and curves into output_dir.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from datasets import Dataset
from loguru import logger
from peft import TaskType
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from arguments.adapter import AdapterArguments
from arguments.command_line import UserError, parse_arguments, run_stage
from arguments.data import DataArguments
from arguments.encoding import warn_of_joined_tokens
from arguments.loss import METRICS, TokenLoss
from arguments.model import ModelArguments, keeps_apart
from arguments.order import STRATEGIES, SeededOrder
from arguments.plan import plan_tokens
from arguments.run import RunArguments
from arguments.stops import EndsOnce
from arguments.telemetry import LogLine


@dataclass
class FinetuningArguments(RunArguments, TrainingArguments):
    """transformers.TrainingArguments with this project's defaults."""

    metrics = METRICS
    needs = RunArguments.needs | {"packing_length": "packing"}

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak rate. 2e-4 suits LoRA; all weights want 2e-5."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "By length, rows of a batch need little padding.", "choices": STRATEGIES},
    )
    train_on_inputs: bool = field(
        default=False, metadata={"help": "Train all turns: system texts, questions and tools' output too."}
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Conversations share rows of packing_length tokens, without seeing each other: no padding."},
    )
    packing_length: int = field(default=1024, metadata={"help": "Tokens of a row with --packing."})


def build_dataset(rows: Dataset, tokenizer, data_args: DataArguments, train_on_inputs: bool = False) -> Dataset:
    """Rows {"input_ids", "labels", "length"}; labels are -100 outside the assistant's turns.

    With `train_on_inputs` all tokens but the first are labels: a packed row would predict that from another text.
    """

    def encode(row):
        encoded = data_args.encode(tokenizer, row["messages"])
        if train_on_inputs:
            encoded["labels"] = [-100, *encoded["input_ids"][1:]]
        return encoded | {"length": len(encoded["input_ids"])}

    return data_args.tokenize(rows, encode, tokenizer, train_on_inputs=train_on_inputs)


def pack(dataset: Dataset, length: int) -> Dataset:
    """Rows {"input_ids", "labels", "position_ids", "length"} of at most `length` tokens, of whole conversations.

    position_ids restart with each conversation, which tells the model where it begins.
    """
    from trl import pack_dataset  # here, since the import takes 0.3 s of every start

    packed = pack_dataset(dataset.select_columns(["input_ids", "labels"]), length)  # best fit decreasing

    def positions(row):
        numbers = [i for count in row["seq_lengths"] for i in range(count)]
        return {"position_ids": numbers, "length": len(numbers)}

    return packed.map(positions, remove_columns="seq_lengths", desc="Numbering positions")


def packing_summary(packed: Dataset, length: int) -> str:
    full = sum(packed["length"]) / (len(packed) * length)
    return f"--packing makes {len(packed):,} rows of {length} tokens, {full:.1%} full, of the records below."


def collate(rows: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows padded to the longest, with an attention mask or, if they are packed, with position_ids instead.

    Each padding token of a packed row is at position 0: a sequence of its own.
    """

    def padded(lists, value):
        return pad_sequence([torch.tensor(ids) for ids in lists], batch_first=True, padding_value=value)

    names = {"input_ids": pad_token_id, "labels": -100} | ({"position_ids": 0} if "position_ids" in rows[0] else {})
    batch = {name: padded([row[name] for row in rows], value) for name, value in names.items()}
    if "position_ids" not in names:
        batch["attention_mask"] = padded([[1] * len(row["input_ids"]) for row in rows], 0)
    return batch


class FinetuningTrainer(LogLine, EndsOnce, SeededOrder, TokenLoss, Trainer):
    """transformers.Trainer with logits of trained tokens only; on a CPU trl.SFTTrainer computes the prompt's too."""


def main():
    model_args, adapter_args, data_args, training_args = parse_arguments(
        ModelArguments, AdapterArguments, DataArguments, FinetuningArguments
    )
    set_seed(training_args.seed)
    model_args.check(data_args.longest, trains_all=not adapter_args.use_peft, output_dir=training_args.output_dir)
    model_args.resolve_dtype(training_args.precision, trains_all=not adapter_args.use_peft)
    if training_args.packing and training_args.packing_length < data_args.longest:
        raise UserError(
            f"--packing_length {training_args.packing_length} cannot hold a conversation of {data_args.longest} tokens"
        )

    tokenizer = model_args.load_tokenizer()
    warn_of_joined_tokens(tokenizer)
    train_rows, eval_rows = data_args.load_conversations(training_args.output_dir)
    train_dataset = build_dataset(train_rows, tokenizer, data_args, training_args.train_on_inputs)
    eval_dataset = build_dataset(eval_rows, tokenizer, data_args, training_args.train_on_inputs)
    eval_dataset = eval_dataset.sort("length")  # less padding
    if data_args.preview and training_args.packing:
        print(packing_summary(pack(train_dataset, training_args.packing_length), training_args.packing_length))
    if data_args.preview:
        return data_args.show(train_dataset, tokenizer)
    if training_args.plan:
        rows = pack(train_dataset, training_args.packing_length) if training_args.packing else train_dataset
        groups = model_args, adapter_args, training_args
        return plan_tokens(*groups, rows, eval_dataset, partial(collate, pad_token_id=tokenizer.pad_token_id))

    model = model_args.load_model(AutoModelForCausalLM)
    if training_args.packing and keeps_apart(model):
        with training_args.main_process_first(desc="packing"):  # the others find its file
            train_dataset = pack(train_dataset, training_args.packing_length)
    elif training_args.packing:
        logger.warning(f"{model.config.model_type} does not use position_ids: batches of like length, not packing")
    model = adapter_args.apply(model, TaskType.CAUSAL_LM)
    training_args.avoid_casts(model)
    training_args.compile_layers(model)

    trainer = FinetuningTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
        callbacks=training_args.callbacks(),
    )
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
