r"""Stage 1: continue pretraining a causal language model on documents, to put domain knowledge in.

    python pretraining.py --model_name_or_path models/SmolLM2-135M-Instruct --train_file_dir data/pretrain/train \
        --validation_file_dir data/pretrain/validation --output_dir outputs/pt

Reads   documents: .txt with one a line (or hard-wrapped paragraphs), .json, .jsonl, .csv or .parquet with "text".
Trains  a LoRA adapter (--use_peft False: all weights) on blocks packed from the documents, eos after each.
Writes  the adapter, tokenizer, metrics (held-out perplexity) and curves into output_dir.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from datasets import Dataset, IterableDataset
from peft import TaskType
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from arguments.adapter import AdapterArguments
from arguments.command_line import UserError, parse_arguments, run_stage
from arguments.data import DataArguments
from arguments.encoding import known_ids
from arguments.loss import METRICS, TokenLoss
from arguments.model import ModelArguments, keeps_apart
from arguments.order import SeededOrder
from arguments.plan import plan_tokens
from arguments.rows import cached
from arguments.run import RunArguments
from arguments.stops import EndsOnce
from arguments.telemetry import LogLine


@dataclass
class PretrainingArguments(RunArguments, TrainingArguments):
    """transformers.TrainingArguments, and how documents become blocks."""

    metrics = METRICS

    learning_rate: float = field(default=2e-4, metadata={"help": "Peak rate. 2e-4 suits LoRA; all weights want 2e-5."})
    block_size: int = field(default=512, metadata={"help": "Tokens of a training block; longer sees more context."})
    keep_linebreaks: bool = field(default=True, metadata={"help": "Keep the line breaks inside a document."})
    isolate_documents: bool = field(
        default=False, metadata={"help": "Documents in a block do not see each other (models with position_ids)."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Tokenize while training, in endless passes (needs --max_steps)."}
    )

    def __post_init__(self):
        if self.block_size < 2:
            raise UserError(f"--block_size is {self.block_size}, expected at least 2")
        if self.streaming and self.max_steps < 1:
            raise UserError("--streaming has no known end: set --max_steps")
        super().__post_init__()


def encode_document(row: dict, tokenizer, keep_linebreaks: bool) -> dict[str, list[int]]:
    text = row["text"] if keep_linebreaks else " ".join(row["text"].split())
    ids = tokenizer(text)["input_ids"]  # with the bos that LLaMA, Gemma and others want before a text
    ids = ids if ids[-1:] == [tokenizer.eos_token_id] else ids + [tokenizer.eos_token_id]
    return {"input_ids": known_ids(tokenizer, ids)}


def pack(documents: Iterable[dict], pad_token_id: int, block_size: int, isolate: bool) -> Iterator[dict]:
    """Blocks of block_size tokens out of the documents' input_ids; the shorter last one is padded, if it trains any.

    Yields {"input_ids", "attention_mask", "labels"}, each of length block_size; padding is -100 in the labels. With
    `isolate`, position_ids that restart with each document and block replace the mask, and the first token after each
    restart is not a label.
    """
    ids, positions = [], []
    for document in documents:
        ids, positions = ids + document["input_ids"], positions + list(range(len(document["input_ids"])))
        rest = len(ids) - len(ids) % block_size
        for start in range(0, rest, block_size):
            taken = slice(start, start + block_size)
            yield block(ids[taken], positions[taken], pad_token_id, block_size, isolate)
        ids, positions = ids[rest:], positions[rest:]
    last = block(ids, positions, pad_token_id, block_size, isolate)
    if any(label != -100 for label in last["labels"][1:]):  # a first token is nothing's next one
        yield last


def block(ids: list[int], positions: list[int], pad_token_id: int, length: int, isolate: bool) -> dict[str, list[int]]:
    """A block of `length` tokens with labels, and its attention mask or, with `isolate`, its position_ids."""
    missing = length - len(ids)
    found = {"input_ids": ids + [pad_token_id] * missing, "labels": ids + [-100] * missing}
    if not isolate:
        return found | {"attention_mask": [1] * len(ids) + [0] * missing}
    first = next((i for i, position in enumerate(positions) if position == 0), len(positions))
    # tokens before `first` continue a document of the previous block, which this one does not see: positions restart
    positions = [*range(first), *positions[first:]]
    labels = [-100 if position == 0 else label for label, position in zip(ids, positions, strict=True)]
    return found | {"labels": labels + [-100] * missing, "position_ids": positions + [0] * missing}


def stream(rows: Dataset, encode: Callable, seed: int | None, settings: dict) -> Iterator[dict]:
    """Blocks of documents tokenized on demand: one pass in order or, with `seed`, endless reshuffled passes.

    A Trainer that resumes skips blocks from the start of the stream: it would miscount one that ends and restarts.
    """
    passes = [rows] if seed is None else (rows.shuffle(seed=seed + number) for number in itertools.count())
    yield from pack((encode(row) for one in passes for row in one), **settings)


def build_blocks(
    rows: Dataset, tokenizer, data_args: DataArguments, args: PretrainingArguments, seed: int | None = None
):
    """The blocks of all documents, shuffled by `seed`, as a Dataset (or, streaming, an IterableDataset)."""
    encode = partial(encode_document, tokenizer=tokenizer, keep_linebreaks=args.keep_linebreaks)
    settings = {
        "pad_token_id": tokenizer.pad_token_id,
        "block_size": args.block_size,
        "isolate": args.isolate_documents,
    }
    if args.streaming:
        kwargs = {"rows": rows, "encode": encode, "seed": seed, "settings": settings}
        return IterableDataset.from_generator(stream, gen_kwargs=kwargs)
    documents = data_args.tokenize(rows, encode, tokenizer, keep_linebreaks=args.keep_linebreaks)
    if seed is not None:  # before packing: a block holds parts of several documents
        documents = documents.shuffle(seed=seed)
    key = documents._fingerprint, settings
    return cached(pack, {"documents": documents} | settings, None, *key, fresh=data_args.overwrite_cache)


class PretrainingTrainer(LogLine, EndsOnce, SeededOrder, TokenLoss, Trainer):
    """transformers.Trainer with a memory-saving loss, token-weighted held-out loss and perplexity."""


def main():
    model_args, adapter_args, data_args, training_args = parse_arguments(
        ModelArguments, AdapterArguments, DataArguments, PretrainingArguments
    )
    set_seed(training_args.seed)
    model_args.check(
        training_args.block_size, trains_all=not adapter_args.use_peft, output_dir=training_args.output_dir
    )
    model_args.resolve_dtype(training_args.precision, trains_all=not adapter_args.use_peft)

    tokenizer = model_args.load_tokenizer()
    train_rows, eval_rows = data_args.load_documents(training_args.output_dir)
    train_dataset = build_blocks(train_rows, tokenizer, data_args, training_args, seed=training_args.order_seed)
    eval_dataset = build_blocks(eval_rows, tokenizer, data_args, training_args)
    if data_args.preview:
        if training_args.streaming:  # it has no end
            train_dataset = Dataset.from_list(list(train_dataset.take(data_args.preview)))
        return data_args.show(train_dataset, tokenizer)
    if training_args.plan:
        groups = model_args, adapter_args, training_args
        return plan_tokens(*groups, train_dataset, eval_dataset, default_data_collator)

    model = model_args.load_model(AutoModelForCausalLM)
    if training_args.isolate_documents and not keeps_apart(model):
        raise UserError(f"--isolate_documents: {model.config.model_type} does not use position_ids: leave it out")
    model = adapter_args.apply(model, TaskType.CAUSAL_LM)
    training_args.avoid_casts(model)
    training_args.compile_layers(model)

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
