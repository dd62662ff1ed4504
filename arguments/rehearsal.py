"""A stage's model, loss and optimizer on tensors without storage: the peaks of its phases under a given load."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftModel, TaskType
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

from arguments.base import weight_files
from arguments.loss import TokenLoss
from arguments.pairs import collate_pairs, may_share, score_pairs, shared_tokens, with_length
from arguments.precision import frozen_linears
from arguments.shapes import Footprint, without_storage

NF4_BITS = 4.127  # a weight, with its share of the doubly quantised scales (arXiv 2305.14314)


@dataclass(frozen=True)
class Load:
    """What a step has to carry: rows at once, the share of their tokens that is kept, and what saves memory."""

    rows: int
    share: float = 1.0
    checkpointing: bool = False
    bits: float = 0  # of frozen linear weights; 0: in their dtype


class Rehearsal(TokenLoss):
    """A model without storage with its optimizer, and the peaks of the phases that are run on it, in bytes by role.

    No Trainer: of TokenLoss only compute_loss is used, which reads self.accelerator alone.
    """

    copies = 1  # of the trained weights in a checkpoint

    def __init__(self, build: Callable[[], nn.Module], model_args, args, load: Load, accumulates: bool):
        self.model_args, self.args, self.device, self.phases = model_args, args, args.device, {}
        precision = "no" if args.precision == "fp32" else args.precision
        self.accelerator = Accelerator(mixed_precision=precision, cpu=args.use_cpu)
        self.mapped = 0
        self.model = without_storage(lambda: self.with_casts(build()), self.device)
        self.footprint = Footprint(self.model.config.get_text_config().vocab_size)
        if load.checkpointing:  # by the settings that transformers' Trainer reads
            others = dict(args.activation_checkpointing_kwargs or {})
            own = {name: others.pop(name) for name in ("every_n_layers", "offload") if name in others}
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=others or None, **own)
        self.hold_weights(load.bits)
        self.hold_optimizer(accumulates)

    def with_casts(self, model: nn.Module) -> nn.Module:
        """RunArguments.avoid_casts; on a CPU the file stays mapped, though its weights are now held in another dtype.

        Its pages count as resident while any weight, such as the embedding, is still a view of it.
        """
        before = [(parameter, parameter.nbytes) for parameter in model.parameters() if not parameter.requires_grad]
        self.args.avoid_casts(model)
        files = weight_files(self.model_args.model_name_or_path)
        numbers = sum(parameter.numel() for parameter, _ in before)
        stored = sum(path.stat().st_size for path in files if path.suffix == ".safetensors") / max(numbers, 1)
        if self.device.type == "cpu" and round(stored) == self.model_args.torch_dtype().itemsize:
            self.mapped = sum(size for parameter, size in before if parameter.nbytes != size)
        return model

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def hold_weights(self, bits: float) -> None:
        lora = any("lora_" in name for name, _ in self.model.named_parameters())
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            of_adapter = lora and (tensor.requires_grad or "lora_" in name)
            self.footprint.label("adapters" if of_adapter else "weights", [tensor])
        self.footprint.now["mapped"] = 0 if bits else self.mapped
        for weight in (layer.weight for layer in frozen_linears(self.model)) if bits else ():  # as bitsandbytes does
            self.footprint.now["weights"] -= weight.nbytes - math.ceil(weight.numel() * bits / 8)

    def hold_optimizer(self, accumulates: bool) -> None:
        """Take a step, which creates the optimizer's state; gradients stay in memory if micro-batches add to them."""
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args, None)
        optimizer = kind(self.trained, **kwargs)
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        state = [value for values in optimizer.state.values() for value in values.values()]
        self.footprint.label("optimizer", filter(torch.is_tensor, state))
        if accumulates:
            self.footprint.label("gradients", [parameter.grad for parameter in self.trained])
        for parameter in self.trained:
            parameter.grad = parameter.grad if accumulates else None
            parameter.register_post_accumulate_grad_hook(lambda p: self.footprint.label("gradients", [p.grad]))
        self.optimizer = optimizer

    def phase(self, name: str, step: Callable[[], None], grad: bool = True) -> None:
        self.model.train(grad)
        with torch.set_grad_enabled(grad), self.footprint.phase() as self.phases[name]:
            step()

    def on_device(self, batch: dict) -> dict:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def longest(dataset: Dataset, load: Load, rows: int | None = None) -> list[dict]:
    """The longest rows of a data set, as many as are in memory at once, their lists cut to the share to keep."""
    if not isinstance(dataset, Dataset):  # streamed, in blocks of one length
        found = list(dataset.take(rows or load.rows))
    else:
        lengths = dataset["length"][:] if "length" in dataset.column_names else map(len, dataset["input_ids"])
        order = sorted(zip(lengths, range(len(dataset)), strict=True), reverse=True)
        found = [dataset[i] for _, i in order[: rows or load.rows]]

    def kept(value):
        return value[: math.ceil(load.share * len(value))] if isinstance(value, list) else value

    return [{name: kept(value) for name, value in row.items()} for row in found]


def rehearse_tokens(model_args, adapter_args, args, train, held_out, collate, load: Load) -> Rehearsal:
    """Stages 1 and 2: TokenLoss over the longest batch; held-out rows without gradients."""

    def build():
        return adapter_args.apply(model_args.load_model(AutoModelForCausalLM), TaskType.CAUSAL_LM)

    found = Rehearsal(build, model_args, args, load, args.gradient_accumulation_steps > 1)
    model = found.accelerator.prepare_model(found.model, device_placement=False, evaluation_mode=True)

    def loss(rows):
        return found.compute_loss(model, found.on_device(collate(rows)), num_items_in_batch=1)

    found.phase("train", lambda: loss(longest(train, load)).backward())
    if evaluates(args):
        rows = longest(held_out, load, args.per_device_eval_batch_size)
        found.phase("evaluate", lambda: loss(rows), grad=False)
    return found


def cut_pair(pair: dict, share: float) -> dict:
    """A pair with that share of its prompt, and of each answer."""
    prompt = shared_tokens(pair["chosen_ids"], pair["rejected_ids"])

    def cut(ids):
        return ids[: math.ceil(share * prompt)] + ids[prompt:][: math.ceil(share * (len(ids) - prompt))]

    return {name: cut(pair[name]) for name in ("chosen_ids", "rejected_ids")}


def rehearse_pairs(model_args, adapter_args, args, train, held_out, tokenizer, limit: int, load: Load) -> Rehearsal:
    """Stage 3: trl.RewardTrainer's loss, chosen and rejected answers in one forward pass and, if they may, one row."""

    def build():
        model = model_args.load_model(AutoModelForSequenceClassification, num_labels=1)
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return adapter_args.apply(model, TaskType.SEQ_CLS)

    found = Rehearsal(build, model_args, args, load, args.gradient_accumulation_steps > 1)
    inner = found.model.get_base_model() if isinstance(found.model, PeftModel) else found.model
    shared = model_args.attn_implementation in (None, "sdpa") and may_share(inner, args, train, limit)
    train, held_out = with_length(train, shared), with_length(held_out, shared)
    model = found.accelerator.prepare_model(found.model, device_placement=False, evaluation_mode=True)

    def loss(rows):
        rows = [cut_pair(row, load.share) for row in rows]
        if shared:
            batch = found.on_device(collate_pairs(rows, tokenizer.pad_token_id))
            outputs = score_pairs(model, inner, **batch, use_cache=False)
        else:
            ids = [row[name] for name in ("chosen_ids", "rejected_ids") for row in rows]
            outputs = model(**found.on_device(tokenizer.pad({"input_ids": ids}, return_tensors="pt")), use_cache=False)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        return -nn.functional.logsigmoid(chosen - rejected).mean() + (chosen + rejected).square().mean()

    found.phase("train", lambda: loss(longest(train, replace(load, share=1))).backward())
    if evaluates(args):
        rows = longest(held_out, replace(load, share=1), args.per_device_eval_batch_size)
        found.phase("evaluate", lambda: loss(rows), grad=False)
    return found


def evaluates(args) -> bool:
    return args.do_eval or args.eval_on_start or args.eval_strategy != "no"
