"""Stage 1: continue pretraining a causal language model on documents, to put domain knowledge in.

    python pretraining.py --model_name_or_path models/SmolLM2-135M-Instruct --train_file_dir data/pretrain/train \
        --validation_file_dir data/pretrain/validation --output_dir outputs/pt

Reads   documents: .txt with one a line, .json or .jsonl with {"text"}.
Trains  a LoRA adapter (--use_peft False: all weights) on blocks packed from the documents, eos after each.
Writes  the adapter, tokenizer, metrics (held-out perplexity) and curves into output_dir.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset
from peft import TaskType
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from arguments import (
    AdapterArguments,
    DataArguments,
    ModelArguments,
    RunArguments,
    TokenWeightedEvaluation,
    UserError,
    parse_arguments,
    run_stage,
)


@dataclass
class PretrainingArguments(RunArguments, TrainingArguments):
    """transformers.TrainingArguments, and how documents become blocks."""

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak rate. 2e-4 suits LoRA; all weights want 2e-5."})
    block_size: int = field(default=512, metadata={"help": "Tokens of a training block; longer sees more context."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line breaks inside a document."})
    streaming: bool = field(default=False, metadata={"help": "Tokenize while training (needs --max_steps)."})

    def __post_init__(self):
        if self.block_size < 2:
            raise UserError(f"--block_size is {self.block_size}, expected at least 2")
        if self.streaming and self.max_steps < 1:
            raise UserError("--streaming has no known end: set --max_steps")
        super().__post_init__()


def pack(documents: Iterable[str], tokenizer, block_size: int) -> Iterator[dict[str, list[int]]]:
    """Blocks of block_size tokens out of the documents, eos after each; the shorter last block is kept, padded.

    Yields {"input_ids", "attention_mask", "labels"}, each of length block_size; padding is -100 in the labels.
    """
    buffer: list[int] = []
    for document in documents:
        buffer += tokenizer(document, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        while len(buffer) >= block_size:
            yield padded(buffer[:block_size], tokenizer.pad_token_id, block_size)
            buffer = buffer[block_size:]
    if buffer:
        yield padded(buffer, tokenizer.pad_token_id, block_size)


def padded(ids: list[int], pad_token_id: int, length: int) -> dict[str, list[int]]:
    missing = length - len(ids)
    return {
        "input_ids": ids + [pad_token_id] * missing,
        "attention_mask": [1] * len(ids) + [0] * missing,
        "labels": ids + [-100] * missing,
    }


def build_blocks(rows: Dataset, tokenizer, args: PretrainingArguments, streaming: bool = False):
    """The blocks of all documents in their order, as a Dataset (or an IterableDataset)."""
    texts = rows["text"]
    documents = texts if args.keep_linebreaks else [" ".join(text.split()) for text in texts]
    if streaming:
        return IterableDataset.from_generator(
            pack, gen_kwargs={"documents": list(documents), "tokenizer": tokenizer, "block_size": args.block_size}
        )
    return Dataset.from_list(list(pack(documents, tokenizer, args.block_size)))


class PretrainingTrainer(TokenWeightedEvaluation, Trainer):
    """transformers.Trainer with token-weighted held-out loss and perplexity."""


def main():
    model_args, adapter_args, data_args, training_args = parse_arguments(
        ModelArguments, AdapterArguments, DataArguments, PretrainingArguments
    )
    set_seed(training_args.seed)

    tokenizer = model_args.load_tokenizer()
    train_rows, eval_rows = data_args.load_documents()
    train_rows = train_rows.shuffle(seed=training_args.seed)  # blocks are cut through documents: mix those first
    train_dataset = build_blocks(train_rows, tokenizer, training_args, streaming=training_args.streaming)
    eval_dataset = build_blocks(eval_rows, tokenizer, training_args)

    model = model_args.load_model(AutoModelForCausalLM)
    model = adapter_args.apply(model, TaskType.CAUSAL_LM)

    trainer = PretrainingTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=training_args.callbacks(),
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.checkpoint())
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_model()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    training_args.finish(trainer)


if __name__ == "__main__":
    run_stage(main)
