"""A stage's model, loss and optimizer on tensors without storage: the peaks of its phases under a given load."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache, Trainer

from arguments.adapter import trained_in_float32
from arguments.base import is_base, weight_files
from arguments.loss import TokenLoss, logits_at
from arguments.roles import ActorCritic, at_columns, disable_dropout, full_precision_head, score_head
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
    """A model without storage with its optimizer, and the peaks of the phases that are run on it, in bytes by role."""

    def __init__(self, build: Callable[[], nn.Module], model_args, args, load: Load, accumulates: bool):
        self.model_args, self.args, self.device, self.phases = model_args, args, args.device, {}
        precision = "no" if args.precision == "fp32" else args.precision
        self.accelerator = Accelerator(mixed_precision=precision, cpu=args.use_cpu)
        self.mapped = 0
        self.model = without_storage(lambda: self.with_casts(build()), self.device)
        self.footprint = Footprint(self.model.config.get_text_config().vocab_size)
        if load.checkpointing:
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.hold_weights(load.bits)
        self.hold_optimizer(accumulates)

    def with_casts(self, model: nn.Module) -> nn.Module:
        """RunArguments.keep_casts; on a CPU the file stays mapped, though what it held is kept in another dtype.

        Its pages count as resident while any weight, such as the embedding, is still a view of it.
        """
        before = [(parameter, parameter.nbytes) for parameter in model.parameters() if not parameter.requires_grad]
        self.args.keep_casts(model)
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
        if bits:
            linear = [layer.weight for layer in self.model.modules() if type(layer) is nn.Linear]
            frozen = {id(weight): weight for weight in linear if not weight.requires_grad}
            for weight in frozen.values():
                self.footprint.now["weights"] -= weight.nbytes - math.ceil(weight.numel() * bits / 8)

    def hold_optimizer(self, accumulates: bool) -> None:
        """Take a step, which makes the optimizer's state; gradients stay where micro-batches add to them."""
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
        self.footprint.events.clear()  # what is held all the time counts in full, and where it lies is not known

    def phase(self, name: str, step: Callable[[], None], grad: bool = True) -> None:
        self.model.train(grad)
        with torch.set_grad_enabled(grad), self.footprint.phase(self.device.type == "cpu") as self.phases[name]:
            step()

    def on_device(self, batch: dict) -> dict:
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


# --- models


def base_model(model_args, auto_class, **settings) -> nn.Module:
    """The base model as its config describes it, in the dtype that the flags load it in."""
    config = model_args.load_config()
    for name, value in settings.items():
        setattr(config, name, value)
    return auto_class.from_config(
        config, dtype=model_args.torch_dtype(), trust_remote_code=model_args.trust_remote_code
    )


def adapted(model, adapter_args, task_type: TaskType) -> nn.Module:
    """AdapterArguments.apply; an adapter to go on with is made anew from its config, for its weights are not read."""
    if not adapter_args.peft_path:
        return adapter_args.apply(model, task_type)
    config = PeftConfig.from_pretrained(adapter_args.peft_path, inference_mode=False)
    model = get_peft_model(model, config)
    trained_in_float32(model)
    return model


def actor_critic(model_args, adapter_args, reward_args, critic: str) -> nn.Module:
    """What roles.build_actor_critic makes; a reward model that is loaded beside hangs on it as `beside`."""
    adapter, name = reward_args.find_adapter(), reward_args.reward_model_name_or_path
    shared = bool(adapter) and adapter_args.use_peft and is_base(adapter, model_args.model_name_or_path)
    policy = base_model(model_args, AutoModelForCausalLM)
    full_precision_head(policy)
    size = policy.config.get_text_config().hidden_size
    policy = adapted(policy, adapter_args, TaskType.CAUSAL_LM)
    if shared:
        policy.add_adapter("reward", PeftConfig.from_pretrained(adapter, inference_mode=True))
    if adapter_args.use_peft and critic == "adapter":
        policy.add_adapter("value", adapter_args.peft_config(TaskType.CAUSAL_LM))
    disable_dropout(policy)
    reward_head = score_head(size, None) if shared else None
    model = ActorCritic(policy, score_head(size, None), reward_head, adapter_args.use_peft, critic)
    if name and not shared:
        source = PeftConfig.from_pretrained(adapter).base_model_name_or_path if adapter else name
        of_reward = type(model_args)(model_name_or_path=source, dtype=model_args.dtype)
        model.beside = base_model(of_reward, AutoModelForSequenceClassification, num_labels=1).requires_grad_(False)
    return model


# --- rows


def longest(dataset: Dataset, load: Load, rows: int | None = None) -> list[dict]:
    """The longest rows of a data set, as many as are in memory at once, their lists cut to the share to keep."""
    if not isinstance(dataset, Dataset):  # streamed, in blocks of one length
        found = list(dataset.take(rows or load.rows))
    else:
        lengths = dataset["length"] if "length" in dataset.column_names else map(len, dataset["input_ids"])
        order = sorted(zip(lengths, range(len(dataset)), strict=True), reverse=True)
        found = [dataset[i] for _, i in order[: rows or load.rows]]

    def kept(value):
        return value[: math.ceil(load.share * len(value))] if isinstance(value, list) else value

    return [{name: kept(value) for name, value in row.items()} for row in found]


# --- stages


def rehearse_tokens(model_args, adapter_args, args, load: Load, train, held_out, collate) -> Rehearsal:
    """Stages 1 and 2: TokenLoss over the longest batch; held-out rows without gradients."""

    def build():
        return adapted(base_model(model_args, AutoModelForCausalLM), adapter_args, TaskType.CAUSAL_LM)

    found = Rehearsal(build, model_args, args, load, args.gradient_accumulation_steps > 1)
    model = found.accelerator.prepare_model(found.model, device_placement=False, evaluation_mode=True)

    def loss(rows):
        return found.compute_loss(model, found.on_device(collate(rows)), num_items_in_batch=1)

    found.phase("train", lambda: loss(longest(train, load)).backward())
    if evaluates(args):
        rows = longest(held_out, load, args.per_device_eval_batch_size)
        found.phase("evaluate", lambda: loss(rows), grad=False)
    return found


def rehearse_pairs(model_args, adapter_args, args, load: Load, train, held_out, tokenizer) -> Rehearsal:
    """Stage 3: trl.RewardTrainer's loss, chosen and rejected answers in one forward pass."""

    def build():
        model = base_model(model_args, AutoModelForSequenceClassification, num_labels=1)
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return adapted(model, adapter_args, TaskType.SEQ_CLS)

    found = Rehearsal(build, model_args, args, load, args.gradient_accumulation_steps > 1)
    model = found.accelerator.prepare_model(found.model, device_placement=False, evaluation_mode=True)

    def loss(rows):
        ids = [row[name] for name in ("chosen_ids", "rejected_ids") for row in rows]
        batch = found.on_device(tokenizer.pad({"input_ids": ids}, return_tensors="pt"))
        chosen, rejected = model(**batch, use_cache=False).logits.squeeze(-1).chunk(2)
        return -nn.functional.logsigmoid(chosen - rejected).mean() + (chosen + rejected).square().mean()

    found.phase("train", lambda: loss(longest(train, load)).backward())
    if evaluates(args):
        rows = longest(held_out, load, args.per_device_eval_batch_size)
        found.phase("evaluate", lambda: loss(rows), grad=False)
    return found


def evaluates(args) -> bool:
    return args.do_eval or args.eval_on_start or args.eval_strategy != "no"


def rehearse_ppo(model_args, adapter_args, args, load: Load, train, held_out, length: int, reward_args) -> Rehearsal:
    """Stage 4: sampling with a KV cache, scoring, and an update of one micro-batch; answers of `length` tokens."""

    def build():
        return actor_critic(model_args, adapter_args, reward_args, args.critic)

    found = Rehearsal(build, model_args, args, load, accumulates=True)
    found.footprint.now["adapters"] += sum(p.nbytes for p in found.trained)  # the last good policy, for the guards
    answer = math.ceil(load.share * length)
    sampled = min(8 * load.rows, max(args.batch_size, len(held_out) if evaluates(args) else 0))
    prompts = [row["input_ids"] for row in longest(train, load, sampled)]
    found.phase("sample", lambda: sample(found, (len(prompts), len(prompts[0])), answer), grad=False)
    batch = min(load.rows, args.batch_size), len(prompts[0]), answer
    found.phase("score", lambda: score(found, *batch), grad=False)
    found.phase("update", lambda: update(found, *batch))
    return found


def tokens(found: Rehearsal, *shape: int) -> torch.Tensor:
    """Token ids, which one does not matter."""
    return torch.ones(shape, dtype=torch.long, device=found.device)


class CountedCache(DynamicCache):
    """A KV cache whose tensors count as such."""

    def __init__(self, footprint: Footprint):
        super().__init__()
        self.footprint = footprint

    def update(self, *args, **kwargs):
        states = super().update(*args, **kwargs)
        self.footprint.label("KV cache", states)
        return states


def sample(found: Rehearsal, shape: tuple[int, int], answer: int) -> None:
    """What generate holds at its widest: prompts [rows, tokens], and the step that draws the last of `answer` tokens.

    In between, the cache grows by as many tokens as the prompts have, or fewer: one at a time would take long.
    """
    rows, prompt = shape
    cache, seen = CountedCache(found.footprint), 0
    widths = [prompt, *(min(prompt, answer - 2 - at) for at in range(0, answer - 2, prompt)), 1]
    with found.model.role("policy") as model, found.accelerator.autocast():
        for width in widths:
            seen += width
            last = torch.arange(rows, device=found.device), torch.full((rows,), width - 1, device=found.device)
            mask = tokens(found, rows, seen)
            mask[0, 0] = 0  # padding on the left, as prompts of several lengths have it
            with logits_at(model, *last):
                ids = tokens(found, rows, width)
                logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[0]
            logits.float().softmax(-1).double().cumsum(-1)  # the choice of a token


def answer_logits(found: Rehearsal, role: str, rows: int, prompt: int, answer: int) -> torch.Tensor:
    """Logits [rows * answer, vocabulary] of all answer tokens, as PPO's token_logp asks for them."""
    at = torch.arange(rows, device=found.device).repeat_interleave(answer)
    columns = torch.arange(prompt - 1, prompt + answer - 1, device=found.device).repeat(rows)
    with found.accelerator.autocast():
        logits = found.model.logits(role, tokens(found, rows, prompt + answer), at, columns) / found.args.temperature
    return logits


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    chosen = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
    return logits.gather(1, chosen).squeeze(1) - logits.logsumexp(-1)


def score(found: Rehearsal, rows: int, prompt: int, answer: int) -> None:
    """Log-probabilities under policy (with entropies) and reference, then hidden states for reward and value."""
    for role in ("policy", "reference"):
        logits = answer_logits(found, role, rows, prompt, answer)
        log_probabilities(logits)
        (logits.softmax(-1) * logits).sum(-1)
        del logits
    ids = tokens(found, rows, prompt + answer)
    if hasattr(found.model, "beside"):
        found.model.beside(input_ids=ids)
    with found.accelerator.autocast():
        found.model.hidden(found.model.frozen_role, ids)


def update(found: Rehearsal, rows: int, prompt: int, answer: int) -> None:
    """Forward and backward of the policy, then of the value function."""
    log_probabilities(answer_logits(found, "policy", rows, prompt, answer)).exp().sum().backward()
    columns = torch.arange(prompt - 1, prompt + answer - 1, device=found.device).repeat(rows, 1)
    if found.model.trains_critic_body:
        with found.accelerator.autocast():
            states = at_columns(found.model.hidden("value", tokens(found, rows, prompt + answer)), columns)
    else:
        states = torch.zeros(rows, answer, found.model.value_head.in_features, device=found.device)
    found.model.value_head(states).square().sum().backward()
