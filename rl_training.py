"""Stage 4: PPO, to improve the SFT model against the reward model.

    python rl_training.py --model_name_or_path outputs/sft-merged --reward_model_name_or_path outputs/rm \
        --train_file_dir data/prompts/train --validation_file_dir data/prompts/validation --output_dir outputs/rl

Reads   prompts: the SFT records, or {"prompt"}; a reward model: the adapter of stage 3, merged or not.
Trains  a LoRA adapter (--use_peft False: all weights) for the policy, and another with a head for the value function.
Writes  the policy's adapter, tokenizer, metrics (held-out reward, KL, length), sampled answers and curves into
        output_dir; the value function into output_dir/value.

One base model is in memory: policy, value and reward are adapters on it and the reference is the base with adapters
off. Formulas: "The N implementation details of RLHF with PPO" and arXiv 2403.17031; GAE: arXiv 1506.02438.
"""

import copy
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType

import torch
from datasets import Dataset
from loguru import logger
from peft import PeftConfig, PeftModel, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from arguments import (
    AdapterArguments,
    DataArguments,
    ModelArguments,
    RunArguments,
    UserError,
    parse_arguments,
    run_stage,
)


@dataclass
class PPOArguments(RunArguments, TrainingArguments):
    """transformers.TrainingArguments for PPO. max_steps, save_steps, eval_steps and logging_steps count rollouts."""

    reward_model_name_or_path: str = field(default="", metadata={"help": "Output folder of stage 3. Required."})
    max_steps: int = field(
        default=100, metadata={"help": "Rollouts: each samples batch_size answers and learns from them."}
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts in a rollout, per process."})
    mini_batch_size: int | None = field(default=None, metadata={"help": "Answers in an optimizer step. Default: all."})
    micro_batch_size: int = field(default=8, metadata={"help": "Answers in memory at once; does not change results."})
    ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Of the policy."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the value function; default: twice."}
    )
    adam_epsilon: float = field(default=1e-5, metadata={"help": "1e-5 as in the original PPO."})
    save_steps: float = field(default=50, metadata={"help": "Checkpoint every that many rollouts."})
    logging_steps: float = field(default=1, metadata={"help": "Log every that many rollouts."})
    init_kl_coef: float = field(default=0.05, metadata={"help": "Price of drifting from the reference, per nat."})
    adap_kl_ctrl: bool = field(default=False, metadata={"help": "Move that price so that the KL meets kl_target."})
    kl_target: float = field(
        default=6.0, metadata={"help": "KL per answer (nats) that the adaptive controller wants."}
    )
    kl_horizon: int = field(default=10000, metadata={"help": "Answers over which the controller reacts."})
    early_stopping: bool = field(
        default=False, metadata={"help": "Stop updating the policy in a rollout at target_kl."}
    )
    target_kl: float = field(default=0.1, metadata={"help": "Mean KL per token from the policy that sampled."})
    reward_baseline: float = field(default=0.0, metadata={"help": "Subtracted from every score."})
    reward_clip: float = field(default=10.0, metadata={"help": "Scores are clipped to +- this."})
    missing_eos_penalty: float = field(
        default=1.0, metadata={"help": "Subtracted from the score of an unfinished answer."}
    )
    min_target_length: int = field(default=1, metadata={"help": "Tokens an answer has at least."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of the log-probabilities."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Bias against variance in the advantages."})
    clip_range: float = field(default=0.2, metadata={"help": "Policy ratio clip."})
    value_clip_range: float = field(default=0.2, metadata={"help": "Value clip."})
    value_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss in the common gradient norm."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Mean 0 and variance 1 over a rollout."})

    def __post_init__(self):
        if not self.reward_model_name_or_path:
            raise UserError("--reward_model_name_or_path is missing: name the output folder of the reward stage")
        self.mini_batch_size = self.mini_batch_size or self.batch_size
        for flag in ("max_steps", "batch_size", "mini_batch_size", "micro_batch_size", "ppo_epochs"):
            if getattr(self, flag) < 1:
                raise UserError(f"--{flag} is {getattr(self, flag)}, expected at least 1")
        if self.batch_size % self.mini_batch_size:
            raise UserError(
                f"--batch_size {self.batch_size} is no multiple of --mini_batch_size {self.mini_batch_size}"
            )
        self.rollouts = self.max_steps
        self.per_device_train_batch_size = self.batch_size
        for flag in ("max_steps", "save_steps", "logging_steps", "eval_steps"):  # transformers counts optimizer steps
            if getattr(self, flag):
                setattr(self, flag, int(getattr(self, flag) * self.steps_per_rollout))
        super().__post_init__()
        self.gradient_accumulation_steps, self.remove_unused_columns = 1, False  # micro_batch_size does its work

    @property
    def steps_per_rollout(self) -> int:
        return self.ppo_epochs * (self.batch_size // self.mini_batch_size)


# --- PPO's arithmetic: pure functions of tensors [batch, time]; mask is 1 on response tokens


def advantages_and_returns(rewards, values, mask, gamma: float, lam: float):
    """Generalised advantage estimation over the masked stretch of each row; zero elsewhere.

    delta_t = r_t + gamma V_(t+1) - V_t;  A_t = delta_t + gamma lam A_(t+1);  return = A + V.
    """
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        next_value = values[:, t + 1] * inside if t + 1 < rewards.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following * inside) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def whiten(x, mask, total):
    """Mean 0, variance 1 (Bessel-corrected) over the mask; `total` sums a tensor over all ranks."""
    count, first, second = total(torch.stack([mask.sum(), (x * mask).sum(), (x * x * mask).sum()]).double())
    mean = first / count
    variance = (second - count * mean**2) / (count - 1).clamp(min=1)
    return ((x - mean.float()) * torch.rsqrt(variance + 1e-8).float()) * mask


def policy_loss(logp, old_logp, advantages, mask, clip: float):
    """Sum over response tokens of max(-A rho, -A clip(rho, 1-clip, 1+clip))."""
    ratio = torch.exp(logp - old_logp)
    return (mask * torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))).sum()


def value_loss(values, old_values, returns, mask, clip: float):
    """Half the sum over response tokens of the larger squared error, with and without clipping the value's move."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * (mask * torch.max((values - returns) ** 2, (clipped - returns) ** 2)).sum()


def adapted_kl_coef(coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Proportional controller of Ziegler et al. (arXiv 1909.08593): at most +-20% of the error counts."""
    return coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * samples / horizon)


def prompt_order(prompts: int, per_rollout: int, rollouts: int, repeats: int, seed: int) -> list[int]:
    """Indices for a sequential sampler: each rollout's prompts `repeats` times in a row, reshuffled every pass."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < per_rollout * rollouts:
        order += torch.randperm(prompts, generator=generator).tolist()
    chunks = [order[i * per_rollout : (i + 1) * per_rollout] for i in range(rollouts)]
    return [index for chunk in chunks for _ in range(repeats) for index in chunk]


# --- the models


def last_token(ids, pad_token_id: int):
    """Index [batch] of the last token that is not padding, as AutoModelForSequenceClassification finds it."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    return (positions * (ids != pad_token_id)).argmax(-1)


def score_head(hidden_size: int, state: dict | None) -> nn.Linear:
    """A linear head in float32: with the weights in `state`, else N(0, 1/(hidden_size+1)) as value functions start."""
    head = nn.Linear(hidden_size, 1, bias=bool(state and "bias" in state))
    if state:
        head.load_state_dict(state)
    else:
        nn.init.normal_(head.weight, std=(hidden_size + 1) ** -0.5)
    return head.float()


class ActorCritic(nn.Module):
    """The roles of PPO. With LoRA all share one base; without, reference and value are copies of the policy."""

    def __init__(self, policy, value_head: nn.Linear, reward_head: nn.Linear | None, lora: bool):
        super().__init__()
        self.policy, self.value_head, self.reward_head, self.lora = policy, value_head, reward_head, lora
        self.config = policy.config
        self.copies = (
            nn.ModuleDict()
            if lora
            else nn.ModuleDict(
                {"reference": copy.deepcopy(policy).requires_grad_(False), "value": copy.deepcopy(policy)}
            )
        )
        if reward_head:
            reward_head.requires_grad_(False)
        self.reset_gradients()

    def reset_gradients(self):
        if self.lora:  # switching adapters flips requires_grad
            self.policy.set_requires_grad(["default", "value"], True)
            if "reward" in self.policy.peft_config:
                self.policy.set_requires_grad("reward", False)

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
            self.policy.set_adapter("default" if name == "policy" else name)
            self.reset_gradients()
            yield self.policy.get_base_model()

    def logits(self, name: str, ids, mask, keep):
        """Logits [batch, len(keep), vocabulary] in float32 at the positions `keep`."""
        with self.role(name) as model:
            return model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits.float()

    def outputs(self, name: str, head: nn.Linear, ids, mask):
        """The head's output [batch, time] at every token, in float32."""
        with self.role(name) as model:
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.float()).squeeze(-1)

    def parts(self) -> dict[str, dict]:
        """The trained tensors of policy and value, by part."""
        if self.lora:
            adapters = {"policy": "default", "value": "value"}
            states = {k: get_peft_model_state_dict(self.policy, adapter_name=v) for k, v in adapters.items()}
        else:
            states = {"policy": self.policy.state_dict(), "value": self.copies["value"].state_dict()}
        return states | {"value_head": self.value_head.state_dict()}

    def trained(self) -> tuple[list, list]:
        """Trained parameters of the policy and of the value function."""
        policy, critic = [], []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                of_value = name.startswith(("copies.value.", "value_head.")) or (self.lora and ".value." in name)
                (critic if of_value else policy).append(parameter)
        return policy, critic


def full_precision_head(model) -> None:
    """Keep the output layer out of autocast: bfloat16 logits near 20 lie 0.125 apart, too coarse for a KL."""

    def forward(head, hidden):
        with torch.autocast(hidden.device.type, enabled=False):
            return type(head).forward(head, hidden.to(head.weight.dtype).contiguous())

    head = model.get_output_embeddings()
    head.forward = MethodType(forward, head)  # a bound method follows its head when a model is copied


def same_model(first: str | None, second: str) -> bool:
    return first is not None and (first == second or Path(first).resolve() == Path(second).resolve())


def find_reward_adapter(path: str) -> Path | None:
    """The folder of a reward adapter at `path` (or in its adapter/, after a merge in place), if there is one."""
    folders = [folder for folder in (Path(path), Path(path) / "adapter") if (folder / "adapter_config.json").exists()]
    if not folders:
        return None
    task = PeftConfig.from_pretrained(folders[0]).task_type
    if task != TaskType.SEQ_CLS:
        raise UserError(f"--reward_model_name_or_path {path} is a {task} adapter, not a reward model: train one first")
    return folders[0]


class ExternalReward(nn.Module):
    """A reward model that is not an adapter on the policy's base: its own weights, tokenizer and template."""

    def __init__(self, path: str, data_args: DataArguments, model_args: ModelArguments):
        super().__init__()
        adapter, kwargs = find_reward_adapter(path), model_args.hub_kwargs | {"dtype": model_args._torch_dtype()}
        source = PeftConfig.from_pretrained(adapter).base_model_name_or_path if adapter else path
        try:
            architectures = AutoConfig.from_pretrained(source, **model_args.hub_kwargs).architectures or []
            if not adapter and not any("SequenceClassification" in name for name in architectures):
                raise UserError(f"--reward_model_name_or_path {path} is a {architectures}, which has no score head")
            self.model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **kwargs)
            self.tokenizer = AutoTokenizer.from_pretrained(path, **model_args.hub_kwargs)
        except (OSError, ValueError) as error:
            raise UserError(f"--reward_model_name_or_path {path}: {str(error).strip().splitlines()[0]}") from error
        if adapter:
            self.model = PeftModel.from_pretrained(self.model, adapter)
        self.tokenizer.padding_side = "right"
        self.data_args = data_args
        self.requires_grad_(False).eval()

    def forward(self, conversations: list[list[dict]]):
        """Scores [batch] of conversations that end with an answer."""
        device = next(self.model.parameters()).device
        if self.tokenizer.chat_template:
            rows = [{"input_ids": self.data_args.encode(self.tokenizer, m)["input_ids"]} for m in conversations]
            batch = self.tokenizer.pad(rows, return_tensors="pt")
        else:
            prompts = ["\n".join(m["content"] for m in messages[:-1]) for messages in conversations]
            answers = [messages[-1]["content"] for messages in conversations]
            batch = self.tokenizer(prompts, answers, truncation=True, padding=True, return_tensors="pt")
        return self.model(**batch.to(device)).logits[:, 0].float()


def build_actor_critic(
    model_args, adapter_args, data_args, training_args
) -> tuple[ActorCritic, ExternalReward | None]:
    """Load the base once and put the roles on it, as far as the reward model allows."""
    path = training_args.reward_model_name_or_path
    adapter = find_reward_adapter(path)
    base_name = PeftConfig.from_pretrained(adapter).base_model_name_or_path if adapter else None
    shared = adapter_args.use_peft and same_model(base_name, model_args.model_name_or_path)
    external = None if shared else ExternalReward(path, data_args, model_args)
    why = (
        "an adapter on the policy's base: one base model in memory" if shared else "a model of its own: loaded beside"
    )
    logger.info(f"Reward model {path} is {why}")

    policy = model_args.load_model(AutoModelForCausalLM)
    full_precision_head(policy)
    hidden_size = policy.config.get_text_config().hidden_size
    policy = adapter_args.apply(policy, TaskType.CAUSAL_LM)
    head_state = None
    if shared:
        policy.load_adapter(adapter, "reward", is_trainable=False)
        policy.load_adapter(adapter, "value", is_trainable=True)
        tensors = load_file(adapter / "adapter_model.safetensors")
        head_state = {k.rpartition(".")[2]: v for k, v in tensors.items() if ".score." in k}
    elif adapter_args.use_peft:
        policy.add_adapter("value", adapter_args.peft_config(TaskType.CAUSAL_LM))
    disable_dropout(policy)
    reward_head = score_head(hidden_size, head_state) if shared else None
    return ActorCritic(policy, score_head(hidden_size, head_state), reward_head, adapter_args.use_peft), external


def disable_dropout(model) -> None:
    """Dropout would make the ratio of new to old probabilities random."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


# --- the trainer


class PPOTrainer(Trainer):
    """transformers.Trainer whose training step takes mini-batches from a rollout that it samples itself.

    Checkpoints fall between rollouts, so a resumed run samples and learns as the uninterrupted one does.
    """

    def __init__(self, *args, data_args, external_reward=None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.do_eval and len(self.eval_dataset) < self.args.world_size:
            raise UserError(
                f"{len(self.eval_dataset)} held-out prompts for {self.args.world_size} processes: add some"
            )
        self.data_args, self.external_reward = data_args, external_reward
        self.kl_coef, self.stats, self.rollout, self.policy_stopped = self.args.init_kl_coef, [], None, False
        self.eos_ids = eos_ids(self.model.policy, self.processing_class, data_args)
        if external_reward is not None:
            external_reward.to(self.args.device)
        set_seed(self.args.seed + self.args.process_index)  # ranks sample different answers

    def total(self, tensor):
        """Sum over ranks."""
        return self.accelerator.reduce(tensor, reduction="sum")

    def _get_train_sampler(self, dataset=None):
        per_rollout = self.args.batch_size * self.args.world_size
        repeats = self.args.steps_per_rollout
        return prompt_order(len(self.train_dataset), per_rollout, self.args.rollouts, repeats, self.args.seed)

    def create_optimizer(self, model=None):
        args, (policy, critic) = self.args, self.model.trained()
        groups = [
            {"params": policy, "lr": args.learning_rate},
            {"params": critic, "lr": args.critic_learning_rate or 2 * args.learning_rate},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, weight_decay=args.weight_decay
        )
        return self.optimizer

    # rollout

    @torch.no_grad()
    def generate(self, prompts: list[list[int]]) -> list[list[int]]:
        """One sampled answer per prompt, up to and with its eos. Prompts of like length are sampled together."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: dict[int, list[int]] = {}
        with self.model.role("policy") as model:
            kept, model.generation_config = model.generation_config, self.sampling_config()
            for start in range(0, len(order), 4 * self.args.micro_batch_size):
                chunk = order[start : start + 4 * self.args.micro_batch_size]
                padded = self.processing_class.pad(
                    {"input_ids": [prompts[i] for i in chunk]}, padding_side="left", return_tensors="pt"
                ).to(self.args.device)
                sampled = model.generate(**padded)[:, padded["input_ids"].shape[1] :].tolist()
                answers |= {i: self.until_eos(ids) for i, ids in zip(chunk, sampled, strict=True)}
            model.generation_config = kept
        return [answers[i] for i in range(len(prompts))]

    def sampling_config(self) -> GenerationConfig:
        """Plain sampling: the model's own generation_config may ask for top-k or penalties PPO must not have."""
        return GenerationConfig(
            do_sample=True,
            temperature=self.args.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.data_args.max_target_length,
            min_new_tokens=self.args.min_target_length,
            eos_token_id=self.eos_ids,
            pad_token_id=self.processing_class.pad_token_id,
        )

    def until_eos(self, ids: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return ids[:end]

    def assemble(self, prompts, answers) -> dict[str, torch.Tensor]:
        """ids and mask [batch, time], right-padded; response_mask [batch, time-1] marks the tokens answered.

        Everything [batch, time-1] is aligned with the token predicted, ids[:, 1:].
        """
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        width, pad = max(map(len, rows)), self.processing_class.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.args.device)
        mask, response = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.float32)
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            mask[i, : len(row)] = 1
            response[i, len(prompt) : len(row)] = 1
        return {"ids": ids, "mask": mask, "response_mask": response[:, 1:]}

    def token_logp(self, name: str, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies [batch, time-1] of the response tokens under a role; zero elsewhere."""
        response = batch["response_mask"]
        keep = response.any(dim=0).nonzero().squeeze(1)
        with self.accelerator.autocast():
            logits = self.model.logits(name, batch["ids"], batch["mask"], keep) / self.args.temperature
        logp_all = logits.log_softmax(-1)
        chosen = logp_all.gather(-1, batch["ids"][:, 1:][:, keep].unsqueeze(-1)).squeeze(-1)
        entropy = torch.zeros_like(chosen) if torch.is_grad_enabled() else -(logp_all.exp() * logp_all).sum(-1)
        zeros = torch.zeros_like(response)
        return zeros.index_copy(1, keep, chosen) * response, zeros.index_copy(1, keep, entropy) * response

    def token_values(self, batch: dict) -> torch.Tensor:
        """Values [batch, time-1] of the states before each token; zero outside the response."""
        with self.accelerator.autocast():
            values = self.model.outputs("value", self.model.value_head, batch["ids"], batch["mask"])
        return values[:, :-1] * batch["response_mask"]

    def scores(self, batch: dict, messages, answers) -> torch.Tensor:
        """The reward model's score [batch] of each answer."""
        if self.external_reward is not None:
            texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
            turns = [[*m, {"role": "assistant", "content": text}] for m, text in zip(messages, texts, strict=True)]
            return self.external_reward(turns)  # in the dtype it was loaded in
        with self.accelerator.autocast():
            outputs = self.model.outputs("reward", self.model.reward_head, batch["ids"], batch["mask"])
        return outputs.gather(1, last_token(batch["ids"], self.processing_class.pad_token_id).unsqueeze(1)).squeeze(1)

    @torch.no_grad()
    def sample(self, rows: list[dict], values: bool = True) -> dict:
        """Answer `rows` of the prompt dataset and look at the answers with every role, the critic if `values`."""
        self.model.eval()
        prompts = [row["input_ids"] for row in rows]
        answers = self.generate(prompts)
        order = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)]).argsort()
        pieces = []
        for part in order.split(self.args.micro_batch_size):  # rows of like length together: less padding
            piece = self.assemble([prompts[i] for i in part], [answers[i] for i in part])
            piece["logp"], piece["entropy"] = self.token_logp("policy", piece)
            piece["ref_logp"], _ = self.token_logp("reference", piece)
            if values:
                piece["values"] = self.token_values(piece)
            piece["score"] = self.scores(piece, [rows[i]["prompt"] for i in part], [answers[i] for i in part])
            pieces.append(piece)
        batch = concatenate(pieces, self.processing_class.pad_token_id)
        batch = {name: tensor[order.argsort().to(tensor.device)] for name, tensor in batch.items()}
        batch["finished"] = torch.tensor([float(a[-1] in self.eos_ids) for a in answers], device=self.args.device)
        return batch | {"answers": answers}

    def collect(self, rows: list[dict]) -> dict:
        """A rollout with advantages and returns."""
        args, batch = self.args, self.sample(rows)
        mask, score = batch["response_mask"], batch["score"] - args.reward_baseline
        score = score.clamp(-args.reward_clip, args.reward_clip) - args.missing_eos_penalty * (1 - batch["finished"])
        rewards = -self.kl_coef * (batch["logp"] - batch["ref_logp"])
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        rewards[torch.arange(len(rewards)), last] += score
        batch["advantages"], batch["returns"] = advantages_and_returns(
            rewards, batch["values"], mask, args.gamma, args.gae_lambda
        )
        if args.whiten_advantages:
            batch["advantages"] = whiten(batch["advantages"], mask, self.total)
        self.stats.append(self.describe(batch) | {"kl_coef": self.kl_coef})
        if args.adap_kl_ctrl:
            samples = args.batch_size * args.world_size
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, self.stats[-1]["kl"], args.kl_target, samples, args.kl_horizon
            )
        return batch

    def describe(self, batch: dict) -> dict[str, float]:
        """Means over the answers of all ranks: reward, KL (nats per answer), entropy per token, length, eos rate."""
        mask = batch["response_mask"]
        count, reward, square, kl, entropy, length, finished = self.total(
            torch.stack(
                [
                    torch.tensor(float(len(mask)), device=mask.device),
                    batch["score"].sum(),
                    (batch["score"] ** 2).sum(),
                    (batch["logp"] - batch["ref_logp"]).sum(),
                    batch["entropy"].sum(),
                    mask.sum(),
                    batch["finished"].sum(),
                ]
            )
        ).tolist()
        return {
            "reward": reward / count,
            "reward_std": max(square / count - (reward / count) ** 2, 0.0) ** 0.5,
            "kl": kl / count,
            "entropy": entropy / length,
            "length": length / count,
            "eos_rate": finished / count,
        }

    # update

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        step = self.state.global_step % self.args.steps_per_rollout
        if step == 0:
            self.rollout, self.policy_stopped = self.collect(inputs["rows"]), False
        epoch, part = divmod(step, self.args.batch_size // self.args.mini_batch_size)
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step - part)
        shuffled = torch.randperm(self.args.batch_size, generator=generator)
        rows = shuffled[part * self.args.mini_batch_size : (part + 1) * self.args.mini_batch_size]
        self.model.train()
        return self.update(rows.to(self.args.device))

    def update(self, rows: torch.Tensor) -> torch.Tensor:
        """Gradients of one mini-batch. Losses are means over the response tokens of all micro-batches and ranks."""
        args, sums = self.args, torch.zeros(3, device=self.args.device)
        tokens = self.total(self.rollout["response_mask"][rows].sum())
        by_length = rows[self.rollout["mask"][rows].sum(1).argsort()]
        for chosen in by_length.split(args.micro_batch_size):
            batch = trim({k: v[chosen] for k, v in self.rollout.items() if torch.is_tensor(v)})
            mask = batch["response_mask"]
            if not self.policy_stopped:  # forward and backward of one role before the next takes the base
                logp, _ = self.token_logp("policy", batch)
                loss = policy_loss(logp, batch["logp"], batch["advantages"], mask, args.clip_range) / tokens
                self.accelerator.backward(loss)
                sums[0] += loss.detach()
                sums[2] += ((batch["logp"] - logp.detach()) * mask).sum() / tokens
            values = self.token_values(batch)
            loss = value_loss(values, batch["values"], batch["returns"], mask, args.value_clip_range) / tokens
            self.accelerator.backward(args.value_coef * loss)
            sums[1] += loss.detach()
        self.sum_gradients()
        policy, value, moved = self.total(sums).tolist()
        self.policy_stopped |= args.early_stopping and moved > 1.5 * args.target_kl
        self.stats.append({"policy_loss": policy, "value_loss": value, "step_kl": moved})
        return torch.tensor(policy + args.value_coef * value, device=args.device)

    def sum_gradients(self) -> None:
        """The losses are shares of a global mean, so gradients add up over ranks; DDP's own mean is not used."""
        if self.args.world_size > 1:
            for parameter in sum(self.model.trained(), []):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = self.total(parameter.grad)

    # evaluation, logging, saving

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs and self.stats:
            names = {name for row in self.stats for name in row}
            found = {name: [row[name] for row in self.stats if name in row] for name in sorted(names)}
            logs |= {name: sum(values) / len(values) for name, values in found.items()}
            self.stats = []
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample one answer per held-out prompt, all ranks sharing the work; training's random state is untouched."""
        rows = list(eval_dataset or self.eval_dataset)[self.args.process_index :: self.args.world_size]
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed)
            batch = self.sample(rows, values=False)
        metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.describe(batch).items()}
        metrics |= {f"{metric_key_prefix}_prompts": len(eval_dataset or self.eval_dataset)}
        self.show(rows, batch)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def show(self, rows: list[dict], batch: dict, count: int = 4) -> None:
        """Append the first held-out prompts with their answers and scores to samples.jsonl, and log one."""
        if not self.is_world_process_zero():
            return
        texts = self.processing_class.batch_decode(batch["answers"][:count], skip_special_tokens=True)
        with (Path(self.args.output_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
            for row, text, score in zip(rows, texts, batch["score"].tolist(), strict=False):
                line = {"step": self.state.global_step, "prompt": row["prompt"], "answer": text, "score": score}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        logger.info(f"{rows[0]['prompt'][-1]['content']!r} -> {texts[0]!r} (score {batch['score'][0]:.2f})")

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        parts = self.model.parts()
        self.model.policy.save_pretrained(folder, **({"selected_adapters": ["default"]} if self.model.lora else {}))
        (folder / "value").mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in parts["value"].items()}, folder / "value" / "model.safetensors")
        save_file(parts["value_head"], folder / "value" / "head.safetensors")
        (folder / "value" / "state.json").write_text(json.dumps({"kl_coef": self.kl_coef}))
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder = Path(resume_from_checkpoint)
        value = load_file(folder / "value" / "model.safetensors")
        if self.model.lora:
            policy = load_file(folder / "adapter_model.safetensors")
            set_peft_model_state_dict(self.model.policy, policy, adapter_name="default")
            set_peft_model_state_dict(self.model.policy, value, adapter_name="value")
        else:
            shards = [load_file(path) for path in sorted(folder.glob("model*.safetensors"))]
            self.model.policy.load_state_dict({k: v for s in shards for k, v in s.items()}, strict=False)
            self.model.copies["value"].load_state_dict(value, strict=False)
        self.model.value_head.load_state_dict(load_file(folder / "value" / "head.safetensors"))
        self.kl_coef = json.loads((folder / "value" / "state.json").read_text())["kl_coef"]


def eos_ids(model, tokenizer, data_args: DataArguments) -> list[int]:
    """All ids that end an answer: the tokenizer's eos, the model's, and the one that SFT trains to end a turn."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    trained = data_args.encode(tokenizer, turn)["input_ids"][-1]
    return sorted({tokenizer.eos_token_id, trained, *(i for i in configured if i is not None)})


def concatenate(pieces: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Micro-batches of different widths as one batch, right-padded."""
    joined = {}
    for name in pieces[0]:
        tensors, fill = [piece[name] for piece in pieces], pad_token_id if name == "ids" else 0
        if tensors[0].dim() == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def trim(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch without the columns that are padding in every row."""
    width = int(batch["mask"].sum(1).max())
    cut = {"ids": width, "mask": width}
    return {k: v if v.dim() == 1 else v[:, : cut.get(k, width - 1)] for k, v in batch.items()}


def build_dataset(rows: Dataset, tokenizer, data_args: DataArguments) -> Dataset:
    """Rows {"prompt": messages, "input_ids"}."""
    return rows.map(
        lambda row: {"input_ids": data_args.encode_prompt(tokenizer, row["prompt"])},
        num_proc=data_args.preprocessing_num_workers,
        desc="Tokenizing",
    )


def main():
    model_args, adapter_args, data_args, training_args = parse_arguments(
        ModelArguments, AdapterArguments, DataArguments, PPOArguments
    )
    set_seed(training_args.seed)

    tokenizer = model_args.load_tokenizer()
    train_rows, eval_rows = data_args.load_prompts()
    train_dataset = build_dataset(train_rows, tokenizer, data_args)
    eval_dataset = build_dataset(eval_rows, tokenizer, data_args)

    model, external_reward = build_actor_critic(model_args, adapter_args, data_args, training_args)

    trainer = PPOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=lambda rows: {"rows": rows},
        data_args=data_args,
        external_reward=external_reward,
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
