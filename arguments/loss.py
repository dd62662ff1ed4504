"""The language-modelling loss in little memory: logits of trained tokens only, a part at a time, without copies."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import DistributedType
from transformers.trainer_utils import has_length

from arguments.command_line import Fault

ROWS = 512  # logits in memory at once: 256 took up to 4% longer, 1,024 need nearly the memory of 2,048
# Logits in float32 at once. On a CPU this many stay in a cache: 2**24 took 30 to 70% longer. On a GPU, kernels should
# take longer than their launches, which has not been measured.
CHUNK, CHUNK_OF_GPU = 2**20, 2**24

METRICS = {"loss": False, "perplexity": False}  # held-out, by TokenLoss.log: whether more is better


def at_places(states, rows, columns):
    """states [batch, time, hidden] at n places: [n, hidden]. With a device map they may be on another device."""
    return states[rows.to(states.device), columns.to(states.device)]


@contextmanager
def logits_at(model, rows, columns):
    """Inside, the output layer of `model` sees only the n places (rows, columns): logits are [1, n, vocabulary].

    transformers' logits_to_keep takes the same columns of all rows, half as many logits again where prompts and
    answers differ in length; and not every model supports it.
    """

    chosen = []

    def choose(_, inputs):
        chosen.append(at_places(inputs[0], rows, columns).unsqueeze(0))
        return chosen[-1], *inputs[1:]

    if (layer := model.get_output_embeddings()) is None:
        raise Fault(f"{type(model).__name__} names no output layer (get_output_embeddings): not supported")
    hook = layer.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()
    if not chosen:  # its logits would be those of other places
        raise Fault(f"{type(model).__name__} computes its logits past its output layer: not supported")


@contextmanager
def loss_at(model, rows, columns, targets):
    """Inside, `model` returns as its logits their SummedCrossEntropy at the n places (rows, columns), made in parts.

    For models whose output layer is frozen and computes last. DDP needs the loss among the model's outputs.
    """
    states, layer = [], model.get_output_embeddings()

    def choose(_, inputs):
        states.append(at_places(inputs[0], rows, columns))
        return states[-1][:1], *inputs[1:]  # one row, as --debug underflow_overflow fails on none

    hooks = (
        layer.register_forward_pre_hook(choose),
        layer.register_forward_hook(lambda *_: HeadCrossEntropy.apply(states.pop(), targets, layer.forward)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def parts_of(logits) -> Iterator[slice]:
    """Slices of rows of logits [n, vocabulary], at most CHUNK numbers each, or one row."""
    step = max(1, (CHUNK if logits.device.type == "cpu" else CHUNK_OF_GPU) // logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def cross_entropy_(logits, targets, trains: bool) -> torch.Tensor:
    """Sum in float32 of -log softmax(logits)[target] over logits [n, vocabulary] of any dtype and targets [n].

    With `trains` the gradient takes the place of the logits: their softmax, less 1 at the targets. One softmax makes
    both, where PyTorch keeps a log-softmax of the same size until the backward pass.
    """
    loss = torch.zeros((), dtype=torch.float32, device=logits.device)
    for part in parts_of(logits):
        some, rows = logits[part].float(), torch.arange(len(targets[part]), device=logits.device)
        chances = some.softmax(1)
        # log of the sum of exponentials: the largest logit, less the log of its chance, which is never near 0
        loss += (some.amax(1) - chances.amax(1).log() - some[rows, targets[part]]).sum()
        if trains:
            chances[rows, targets[part]] -= 1
            logits[part] = chances
    return loss


class SummedCrossEntropy(torch.autograd.Function):
    """cross_entropy_ of logits that nobody reads after it; autograd refuses a layer that kept them."""

    @staticmethod
    def forward(ctx, logits, targets):
        loss = cross_entropy_(logits, targets, ctx.needs_input_grad[0])
        ctx.save_for_backward(logits)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        for part in parts_of(gradient):  # in float32: a GPU would round a scalar to the gradient's dtype before
            gradient[part] = gradient[part].float() * upstream  # autograd refuses a second pass
        return gradient, None


class HeadCrossEntropy(torch.autograd.Function):
    """SummedCrossEntropy of head(states), for states [n, hidden], ROWS at a time: never all logits at once.

    The gradient of the states is computed with the loss; `head`, a function, gets none, so it must be frozen.
    torch 2.13's own F.linear_cross_entropy in chunks takes 5 (float32) to 11 times (bf16) as long on a CPU, and its
    loss in bf16 is 0.05% off: 1,024 states of 576 numbers, 49,152 words.
    """

    @staticmethod
    def forward(ctx, states, targets, head):
        trains = ctx.needs_input_grad[0]
        loss, gradient = states.new_zeros((), dtype=torch.float32), torch.empty_like(states) if trains else None
        for start in range(0, len(states), ROWS):
            part = slice(start, start + ROWS)
            some = states[part].detach().requires_grad_(trains)
            with torch.set_grad_enabled(trains):
                logits = head(some)
            own = logits.detach()
            loss += cross_entropy_(own, targets[part].to(own.device), trains).to(loss.device)
            if trains:
                (gradient[part],) = torch.autograd.grad(logits, some, own)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        product = gradient * upstream.view(1)  # in float32: a GPU would round a scalar to the gradient's dtype before
        return product.to(gradient.dtype), None, None


def head_is_last(model, inputs: dict) -> bool:
    """Whether a model's logits are what its output layer returns, neither scaled nor capped: tried on one token."""
    made, training = [], model.training
    hook = model.get_output_embeddings().register_forward_hook(lambda *call: made.append(call[-1]))
    model.eval()  # draws no random numbers
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = model(**{name: tensor[:1, :1] for name, tensor in inputs.items()}, use_cache=False).logits
    finally:
        model.train(training)
        hook.remove()
    return len(made) == 1 and made[0] is logits and logits._version == 0  # else it was written to


def return_narrow(model, accelerator) -> None:
    """Let a model that accelerate prepared return logits in the dtype that autocast computes them in.

    accelerate's wrapper returns a float32 copy, whose gradient is one more: the largest tensors of a step.
    """
    if "_original_forward" in vars(model):
        model.forward = accelerator.autocast()(vars(model).pop("_original_forward"))


def own_rows(trainer, rows: int) -> int:
    """How many of the `rows` in this rank's training batch are its own, not repeats.

    accelerate fills the last batches of an epoch with rows of the first ones, so that all ranks have as many.
    """
    args, ends = trainer.args, trainer.accelerator.gradient_state.end_of_dataloader
    size, ranks, rank = args.train_batch_size, args.world_size, args.process_index
    filled = ranks > 1 and args.train_sampling_strategy != "batch_rebalance"  # whose sampler fills batches by itself
    if not (filled and ends and has_length(trainer.train_dataset)):
        return rows
    left = len(trainer.train_dataset) % (size * ranks) or size * ranks
    return min(max(left - rank * size, 0), rows)


class TokenLoss:
    """Mixed into a Trainer: cross-entropy of the tokens that have a label; held-out, the mean over all such tokens.

    The library's held-out loss averages the means of batches: tokens of short rows weigh more in it. Perplexity and
    the number of tokens are logged with it. The load-balancing loss of a mixture of experts is left out.
    """

    _in_parts = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # whatever loss the model has of its own: transformers then counts the labels that compute_loss takes
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True

    def in_parts(self, model, inputs) -> bool:
        """Whether loss_at can be used: a frozen output layer that computes last and is whole on each device."""
        if self._in_parts is None:
            head, kind = model.get_output_embeddings(), self.accelerator.distributed_type
            frozen = head is not None and not any(p.requires_grad for p in head.parameters())
            whole = kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
            self._in_parts = frozen and whole and head_is_last(model, inputs)
        return self._in_parts

    def get_batch_samples(self, epoch_iterator, *args, **kwargs):
        return super().get_batch_samples(map(self.without_repeats, epoch_iterator), *args, **kwargs)

    def without_repeats(self, inputs: dict) -> dict:
        inputs["labels"][own_rows(self, len(inputs["labels"])) :] = -100
        return inputs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum over the trained tokens divided by num_items_in_batch, their count over all ranks."""
        labels = inputs.pop("labels")[:, 1:]
        rows, columns = (labels != -100).nonzero(as_tuple=True)
        targets, inner = labels[rows, columns], self.accelerator.unwrap_model(model)
        return_narrow(inner, self.accelerator)
        if self.in_parts(inner, inputs):
            with loss_at(inner, rows, columns, targets):
                outputs = model(**inputs, use_cache=False)
            loss = outputs.logits
        else:
            with logits_at(inner, rows, columns):
                outputs = model(**inputs, use_cache=False)
            loss = SummedCrossEntropy.apply(outputs.logits.squeeze(0), targets.to(outputs.logits.device))
        loss = loss * self.accelerator.num_processes / num_items_in_batch  # DDP averages over ranks
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs):
        self._loss_and_tokens = torch.zeros(2, dtype=torch.float64)
        return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        state, rows = self.accelerator.gradient_state, len(inputs["labels"])
        if state.end_of_dataloader and state.remainder > 0:  # the last batch repeats rows to fill all ranks
            own = max(0, state.remainder - self.accelerator.process_index * rows)
            inputs["labels"] = inputs["labels"].clone()
            inputs["labels"][own:] = -100
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        all_tokens = self.accelerator.reduce(tokens.float())  # the loss of a rank is its sum / all_tokens * ranks
        sums = torch.stack([loss.detach().float() * all_tokens / self.accelerator.num_processes, tokens.float()])
        self._loss_and_tokens += self.accelerator.reduce(sums).double().cpu()
        return loss, logits, labels

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "eval_loss" in logs:
            loss, tokens = self._loss_and_tokens.tolist()
            logs |= {"eval_loss": loss / tokens, "eval_perplexity": math.exp(min(loss / tokens, 100))}
            logs["eval_tokens"] = int(tokens)
        super().log(logs, *args, **kwargs)
