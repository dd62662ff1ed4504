"""PPO's roles on one base model: policy and reward are adapters, the reference is the base with adapters off."""

import copy
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType

import torch
from loguru import logger
from peft import TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

from arguments.adapter import cast_trained, with_saved_adapter
from arguments.base import adapter_config, check_base, is_base
from arguments.command_line import UserError
from arguments.loss import logits_at
from arguments.reward import RewardModel, adapter_head, is_own

VALUE = "value_function"  # its adapter; no layer is called so: peft leaves others' weights in such a layer unsaved


def as_trained(ids, answers: list[dict], end_id: int, pad_token_id: int):
    """What a reward adapter reads: ids [batch, time] of answers that end as in its training, and where their scores
    are: columns [batch].

    A policy may end with another of its model's end tokens (Qwen's pad token, Llama 3's <|eom_id|>), at which no score
    was learned. Where the trained end is the only token to pad with, AutoModelForSequenceClassification reads the
    score one token earlier.
    """
    ids, last = ids.clone(), ids.new_tensor([len(answer["prompt"]) + len(answer["ids"]) - 1 for answer in answers])
    finished = [i for i, answer in enumerate(answers) if answer["finished"]]
    ids[finished, last[finished]] = end_id
    if end_id == pad_token_id:
        last[finished] -= 1
    return ids, last


def score_head(hidden_size: int, state: dict | None) -> nn.Linear:
    """A linear head in float32: with the weights in `state`, else with zeros, as the value function starts.

    A reward model knows whole answers. Read at each token of 32 sampled answers, its head explained -58% and -45% of
    the variance of their scores with one seed of SmolLM2, 11% and -14% with another: no better than a head of zeros.
    """
    state = state or {"weight": torch.zeros(1, hidden_size)}
    head = nn.Linear(hidden_size, 1, bias="bias" in state)
    head.load_state_dict(state)
    return head


def at_columns(hidden, columns):
    """hidden [batch, time, size] at columns [batch, n]: [batch, n, size]."""
    return hidden.gather(1, columns.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def collate(answers: list[dict], pad_token_id: int, device) -> dict[str, torch.Tensor]:
    """A batch of answers. ids [batch, time]: prompt and answer, right-padded; the rest is [batch, answer].

    answer_mask marks real tokens, tokens are their ids, columns the positions whose logits predict them; every tensor
    that the answers carry, one number a token, is padded with 0.
    """

    def stacked(rows, value=0):
        return pad_sequence(rows, batch_first=True, padding_value=value)

    rows = [torch.tensor(answer["prompt"] + answer["ids"]) for answer in answers]
    tokens = [torch.tensor(answer["ids"]) for answer in answers]
    before = torch.tensor([[len(answer["prompt"]) - 1] for answer in answers])
    batch = {"ids": stacked(rows, pad_token_id), "tokens": stacked(tokens)}
    batch["answer_mask"] = stacked([torch.ones(len(ids)) for ids in tokens])
    columns = before + torch.arange(batch["tokens"].shape[1])
    batch["columns"] = columns.clamp(max=batch["ids"].shape[1] - 2)
    carried = [name for name, value in answers[0].items() if torch.is_tensor(value)]
    batch |= {name: stacked([answer[name] for answer in answers]) for name in carried}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def trunk(model: PreTrainedModel) -> nn.Module:
    """A causal language model below its head. Llama 4's class names it wrongly: its base_model is the model itself."""
    if model.base_model is not model:
        return model.base_model
    return next(part for part in model.children() if isinstance(part, PreTrainedModel))


class ActorCritic(nn.Module):
    """The roles of PPO. With LoRA all share one base; without, reference and value are copies of the policy.

    The value function is `value_head` on the hidden states of one role: of "value", which is trained with it, or of a
    frozen one (`critic` "head"), whose hidden states are computed once a rollout.
    """

    def __init__(self, policy, value_head: nn.Linear, reward_head: nn.Linear | None, lora: bool, critic: str):
        super().__init__()
        self.policy, self.value_head, self.reward_head, self.lora = policy, value_head, reward_head, lora
        self.config, self.autocast = policy.config, nullcontext  # the trainer gives its own
        self.frozen_role = "reward" if reward_head else "reference"
        self.trains_critic_body = critic == "adapter"
        copies = {} if lora else {"reference": copy.deepcopy(policy).requires_grad_(False)}
        if not lora and self.trains_critic_body:
            copies["value"] = copy.deepcopy(policy)
        self.copies = nn.ModuleDict(copies)
        if reward_head:
            reward_head.requires_grad_(False)
        self.reset_gradients()

    def reset_gradients(self):
        if self.lora:  # switching adapters flips requires_grad
            for adapter in self.policy.peft_config:
                self.policy.set_requires_grad(adapter, adapter != "reward")

    def train(self, mode: bool = True):
        """Put what recomputes its activations in training mode, which it needs to do so; all else stays in evaluation.

        The ratio of new to old probabilities is 1 then before the first step, though a router that samples in training
        (PhiMoE's), noise on its input (Mixtral's) and dropout would make it random.
        """
        super().train(False)
        for module in self.modules():
            module.training = mode and getattr(module, "gradient_checkpointing", False)
        return self

    def activation_checkpointing_enable(self, **kwargs):
        for model in (self.policy, *self.copies.values()):
            model.activation_checkpointing_enable(**kwargs)

    @contextmanager
    def role(self, name: str):
        """The causal language model that plays `name`: policy, reference, value or reward."""
        if not self.lora:
            yield self.copies[name] if name != "policy" else self.policy
        elif name == "reference":
            with self.policy.disable_adapter():
                yield self.policy.get_base_model()
            self.reset_gradients()
        else:
            self.policy.set_adapter({"policy": "default", "value": VALUE}.get(name, name))
            self.reset_gradients()
            yield self.policy.get_base_model()

    def logits(self, name: str, ids, rows, columns):
        """Logits [n, vocabulary] in float32 at the n places (rows, columns) of right-padded ids.

        No attention mask: a causal model sees no padding after a token.
        """
        with self.autocast(), self.role(name) as model, logits_at(model, rows, columns):
            return model(input_ids=ids, use_cache=False).logits.squeeze(0).float()

    def hidden(self, name: str, ids):
        """Last hidden states [batch, time, size] of right-padded ids in float32."""
        with self.autocast(), self.role(name) as model:
            return trunk(model)(input_ids=ids, use_cache=False).last_hidden_state.float()

    def token_logp(self, name: str, batch: dict, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies [batch, answer] of the answers' tokens; entropies of samples only."""
        mask = batch["answer_mask"].bool()
        rows, columns, tokens = mask.nonzero()[:, 0], batch["columns"][mask], batch["tokens"][mask]
        logits = self.logits(name, batch["ids"], rows, columns) / temperature
        chosen = logits.gather(1, tokens.unsqueeze(1)).squeeze(1)  # first: backward then holds a table less
        log_partition = logits.logsumexp(-1)
        nothing = torch.zeros_like(batch["answer_mask"])
        logp = nothing.masked_scatter(mask, chosen - log_partition)
        if torch.is_grad_enabled() or name != "policy":
            return logp, nothing
        entropy = log_partition - (logits.softmax(-1) * logits).sum(-1)
        return logp, nothing.masked_scatter(mask, entropy)

    def reference(self, batch: dict, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """token_logp of the reference, and the last hidden states (as `hidden`) of the same pass."""
        with self.role("reference") as model:
            kept, below = [], trunk(model)
        hook = below.register_forward_hook(lambda *call: kept.append(call[-1].last_hidden_state.float()))
        try:
            logp, _ = self.token_logp("reference", batch, temperature)
        finally:
            hook.remove()
        return logp, kept[0]

    def token_values(self, batch: dict) -> torch.Tensor:
        """Values [batch, answer] of the states before each token."""
        if self.trains_critic_body:
            states = at_columns(self.hidden("value", batch["ids"]), batch["columns"])
        else:
            states = batch["states"]
        return self.value_head(states).squeeze(-1) * batch["answer_mask"]

    def critic_parts(self) -> dict[str, dict]:
        """The tensors of the value function, by the name of their file.

        A tied weight has two names in a state_dict, which safetensors refuses: named_parameters() gives it one.
        """
        parts = {"head": self.value_head.state_dict()}
        if self.trains_critic_body and self.lora:
            parts["model"] = get_peft_model_state_dict(self.policy, adapter_name=VALUE)
        elif self.trains_critic_body:
            parts["model"] = {name: weight.detach() for name, weight in self.copies["value"].named_parameters()}
        return parts

    def save(self, folder: Path) -> None:
        """Write the policy (its adapter, or all weights) into `folder` and the value function into its value/."""
        self.policy.save_pretrained(folder, **({"selected_adapters": ["default"]} if self.lora else {}))
        (folder / "value").mkdir(exist_ok=True)
        for name, tensors in self.critic_parts().items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "value" / f"{name}.safetensors")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            UserError: when it was trained with another --critic.
        """
        critic = {path.stem: load_file(path) for path in (folder / "value").glob("*.safetensors")}
        if critic.keys() != self.critic_parts().keys():
            raise UserError(f"{folder} was trained with another --critic: give the same, or start over with --fresh")
        self.value_head.load_state_dict(critic["head"])
        if self.lora:
            policy = load_file(folder / "adapter_model.safetensors")
            set_peft_model_state_dict(self.policy, policy, adapter_name="default")
        else:
            saved = type(self.policy).from_pretrained(folder, dtype=self.policy.dtype)  # experts get their names back
            self.policy.load_state_dict(saved.state_dict())
        if self.trains_critic_body and self.lora:
            set_peft_model_state_dict(self.policy, critic["model"], adapter_name=VALUE)
        elif self.trains_critic_body:
            self.copies["value"].load_state_dict(critic["model"], strict=False)

    def trained(self) -> tuple[list, list]:
        """Trained parameters of the policy and of the value function."""
        policy, critic = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                of_value = name.startswith(("copies.value.", "value_head.")) or VALUE in name.split(".")
                (critic if of_value else policy).append(parameter)
        return policy, critic


def full_precision_head(model, frozen: bool) -> None:
    """Keep the output layer out of autocast: bfloat16 logits near 20 lie 0.125 apart, too coarse for a KL.

    One that is loaded in bfloat16 and stays `frozen` is widened, apart from the embeddings that it may be tied to.
    """

    def forward(head, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return type(head).forward(head, hidden.to(head.weight.dtype).contiguous())

    head = model.get_output_embeddings()
    if frozen and head.weight.dtype == torch.bfloat16:
        head.weight = nn.Parameter(head.weight.float(), requires_grad=False)
    head.forward = MethodType(forward, head)  # a bound method follows its head when a model is copied


def build_actor_critic(
    model_args, adapter_args, data_args, reward_args, critic: str
) -> tuple[ActorCritic, RewardModel | None]:
    """Load the base once and put the roles on it; a reward model that cannot share it is loaded beside it.

    --plan builds the same without weights.
    """
    if model_args.device_map:  # Trainer does not see it inside ActorCritic, and would move all parts to one GPU
        logger.warning(f"--device_map {model_args.device_map} has no effect in RL: a GPU holds all roles")
        model_args.device_map = None
    adapter, reward_model = reward_args.find_adapter(), None
    base_name = adapter_config(adapter).base_model_name_or_path if adapter else None
    of_base = bool(adapter) and is_base(adapter, model_args.model_name_or_path)
    shared = of_base and adapter_args.use_peft and is_own(adapter)  # others are read elsewhere than an answer's end
    if adapter:
        check_base(adapter, model_args.model_name_or_path if shared else base_name, adapter_args.force)
    if shared:
        logger.info(f"Reward model {adapter} is an adapter on the policy's base: one base model in memory")
    elif reward_args.reward_model_name_or_path:
        if not adapter_args.use_peft:
            why = "shares no base with a policy that trains all weights"
        elif of_base:
            why = "was not trained by stage 3"
        else:
            other = f"is an adapter on {base_name}, and not on {model_args.model_name_or_path}"
            why = other if adapter else "is a whole model"
        reward_model = reward_args.load_model(data_args, model_args)
        level = "WARNING" if adapter and not of_base else "INFO"  # is one of the two bases a mistake?
        logger.log(level, f"Reward model {reward_args.reward_model_name_or_path} {why}: loaded beside the policy")

    policy = model_args.load_model(AutoModelForCausalLM)
    full_precision_head(policy, frozen=adapter_args.use_peft)
    hidden_size = policy.get_output_embeddings().weight.shape[1]  # OPT-350m's states are wider inside
    policy = adapter_args.apply(policy, TaskType.CAUSAL_LM)
    if shared:
        with_saved_adapter(policy, adapter, "reward", trainable=False)
        if critic == "adapter":
            with_saved_adapter(policy, adapter, VALUE, trainable=True)
    elif adapter_args.use_peft and critic == "adapter":
        policy.add_adapter(VALUE, copy.deepcopy(policy.peft_config["default"]))
    if adapter_args.lora_dropout:
        logger.warning("--lora_dropout has no effect in RL: the ratio of new to old probabilities would be random")
    disable_dropout(policy)
    reward_head = score_head(hidden_size, adapter_head(adapter)) if shared else None
    model = ActorCritic(policy, score_head(hidden_size, None), reward_head, adapter_args.use_peft, critic)
    cast_trained(model)  # the critic's adapter came after the policy's
    return model, reward_model


def disable_dropout(model) -> None:
    """Turn off dropout, which would make the ratio of new to old probabilities random in layers that recompute.

    Those alone are in training mode (ActorCritic.train). Many models drop with a function, not a module: at a rate in
    an attribute (attention_dropout, layerdrop), or in the config that their layers hold. The layers then get a copy of
    it, as the model's own is saved with the weights.
    """
    quiet = copy.deepcopy(model.config)
    no_rates(quiet)
    for module in model.modules():
        no_rates(module)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if not isinstance(module, PreTrainedModel) and vars(module).get("config") is model.config:
            module.config = quiet


def no_rates(owner) -> None:
    """Set the dropout rates among the attributes of `owner` to zero."""
    for name, value in vars(owner).items():
        if "drop" in name and isinstance(value, float):
            setattr(owner, name, 0.0)
