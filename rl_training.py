r"""Stage 4: PPO, to improve the SFT model against the reward model.

    python rl_training.py --model_name_or_path outputs/sft-merged --reward_model_name_or_path outputs/rm \
        --train_file_dir data/prompts/train --validation_file_dir data/prompts/validation --output_dir outputs/rl

Reads   prompts: the SFT records, or {"prompt"}; a reward model: the adapter of stage 3, merged or not; with it or
        instead of it Python functions (--reward_functions).
Trains  a LoRA adapter (--use_peft False: all weights) for the policy, and the head of a value function
        (--critic adapter: with a LoRA of its own).
Writes  the policy's adapter, tokenizer, metrics (held-out reward, KL, length, win rate), sampled answers and curves
        into output_dir; the value function into output_dir/value.

One base model is in memory: policy and reward are adapters on it and the reference is the base with adapters off.
Formulas: "The N implementation details of RLHF with PPO" and arXiv 2403.17031; GAE: arXiv 1506.02438.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from loguru import logger
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from arguments.adapter import AdapterArguments
from arguments.answers import describe, mean_kl, means, win_rate
from arguments.atomic import append_step
from arguments.command_line import Fault, UserError, expect, given, parse_arguments, run_stage
from arguments.data import DataArguments
from arguments.encoding import trained_end
from arguments.guards import GuardArguments
from arguments.model import ModelArguments
from arguments.plan import plan_ppo
from arguments.reward import RewardSourceArguments
from arguments.reward_functions import function_scores, recorders
from arguments.roles import as_trained, at_columns, build_actor_critic, collate
from arguments.rollout_server import RolloutServer, sampler_difference
from arguments.run import BY_METRIC, RunArguments
from arguments.sampling import chunks, sample_answers, takes_padding, uniforms
from arguments.stops import EndsOnce
from arguments.telemetry import LogLine

UNUSED = {  # transformers' flags whose work other ones do in RL
    "gradient_accumulation_steps": "--mini_batch_size is the optimizer step, --micro_batch_size what memory holds",
    "per_device_train_batch_size": "--batch_size counts the prompts of a rollout",
    "per_device_eval_batch_size": "--micro_batch_size is what memory holds",
    "num_train_epochs": "--max_steps counts rollouts, --ppo_epochs the passes over each",
    "train_sampling_strategy": "prompts are drawn anew in each pass over them",
    "bf16_full_eval": "held-out answers are sampled as those of a rollout",
    "fp16_full_eval": "held-out answers are sampled as those of a rollout",
}


@dataclass
class PPOArguments(RunArguments, TrainingArguments):
    """transformers.TrainingArguments for PPO. max_steps, save_steps, eval_steps and logging_steps count rollouts;
    warmup_steps and eval_delay count optimizer steps.
    """

    metrics = {"kl": False, "*": True}  # reward functions log metrics of their own
    unused = RunArguments.unused | UNUSED

    max_steps: int = field(
        default=100, metadata={"help": "Rollouts: each samples batch_size answers and learns from them."}
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts in a rollout, per process."})
    mini_batch_size: int | None = field(default=None, metadata={"help": "Answers in an optimizer step. Default: all."})
    micro_batch_size: int = field(
        default=4, metadata={"help": "Answers in memory at once; changes results by rounding alone."}
    )
    ppo_epochs: int = field(default=4, metadata={"help": "Passes over a rollout."})
    metric_for_best_model: str | None = field(
        default=None, metadata={"help": "What tells the best checkpoint, if one is wanted: by default the reward."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak learning rate of the policy."})
    critic: str = field(
        default="head",
        metadata={
            "help": "The value function: head trains a linear head on the frozen hidden states of the reward adapter "
            "(else of the reference), computed once a rollout; adapter trains a LoRA below it too, in twice the time.",
            "choices": ["head", "adapter"],
        },
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the value function. Default: twice the policy's."}
    )
    critic_warmup: int = field(
        default=0, metadata={"help": "Rollouts at the start that train the value function only."}
    )
    adam_epsilon: float = field(default=1e-5, metadata={"help": "1e-5 as in the original PPO."})
    save_steps: float = field(default=50, metadata={"help": "Checkpoint every that many rollouts."})
    logging_steps: float = field(default=1, metadata={"help": "Log every that many rollouts."})
    init_kl_coef: float = field(
        default=0.05, metadata={"help": "KL penalty: reward subtracted per nat of drift from the reference."}
    )
    adap_kl_ctrl: bool = field(
        default=False, metadata={"help": "Adapt the KL penalty so that the KL meets kl_target."}
    )
    kl_target: float = field(
        default=6.0, metadata={"help": "KL per answer (nats) that the adaptive controller wants."}
    )
    kl_horizon: int = field(default=10000, metadata={"help": "Answers over which the controller reacts."})
    kl_estimator: str = field(
        default="k1",
        metadata={
            "help": "Estimator of the logged KL; penalty, adaptive controller and guards always use k1.",
            "choices": ["k1", "k2", "k3"],
        },
    )
    early_stopping: bool = field(
        default=False, metadata={"help": "Stop updating the policy in a rollout at target_kl."}
    )
    target_kl: float = field(
        default=0.1,
        metadata={"help": "Mean KL per token from the policy that sampled; 1.5 times as much is where it stops."},
    )
    reward_baseline: float = field(default=0.0, metadata={"help": "Subtracted from every score."})
    use_score_scaling: bool = field(
        default=False,
        metadata={
            "help": "Divide scores by their standard deviation in the first rollout, so that one KL price, clip and "
            "penalty suit reward models of any scale; logged rewards stay as they are."
        },
    )
    reward_clip: float = field(
        default=10.0,
        metadata={"help": "Scores are clipped to +- this, with --use_score_scaling around the first rollout's mean."},
    )
    missing_eos_penalty: float = field(
        default=1.0, metadata={"help": "Subtracted from the score of an unfinished answer."}
    )
    min_target_length: int = field(default=1, metadata={"help": "Fewest tokens of an answer before its end token."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of sampling and of the log-probabilities."})
    vllm_server: str | None = field(
        default=None,
        metadata={"help": "Address of a vLLM server of the base, which then samples. Needs LoRA; see docs/rl.md."},
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Bias against variance in the advantages."})
    clip_range: float = field(default=0.2, metadata={"help": "Policy ratio clip."})
    value_clip_range: float = field(default=0.2, metadata={"help": "Value clip."})
    value_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss in the common gradient norm."})
    whiten_advantages: bool = field(default=True, metadata={"help": "Mean 0 and variance 1 over a rollout."})

    def __post_init__(self):
        self.mini_batch_size = self.batch_size if self.mini_batch_size is None else self.mini_batch_size
        counts = "max_steps", "batch_size", "mini_batch_size", "micro_batch_size", "ppo_epochs"
        expect(self, "at least 1", lambda x: x >= 1, *counts)
        self._check_ranges()
        self._refuse_in_rl()
        for flag in given(self, UNUSED):
            logger.warning(f"--{flag} has no effect in RL: {UNUSED[flag]}")
        if self.batch_size % self.mini_batch_size:
            raise UserError(
                f"--batch_size {self.batch_size} is not a multiple of --mini_batch_size {self.mini_batch_size}"
            )
        if self.load_best_model_at_end or self.save_strategy == "best" or self.lr_scheduler_type in BY_METRIC:
            self.metric_for_best_model = self.metric_for_best_model or "reward"  # transformers' is the loss
        self.rollouts = self.max_steps
        self._check_saves_of_the_best()
        self.per_device_train_batch_size, self.gradient_accumulation_steps = self.batch_size, 1
        self.remove_unused_columns = False
        for flag in ("max_steps", "save_steps", "logging_steps", "eval_steps"):  # transformers counts optimizer steps
            if 0 < (getattr(self, flag) or 0) < math.inf:  # others are refused below
                setattr(self, flag, self.whole_rollouts(getattr(self, flag)) * self.steps_per_rollout)
        super().__post_init__()
        if self.compile_settings:
            logger.warning("--torch_compile has no effect in RL: its roles change the adapters of one model")

    def _refuse_in_rl(self):
        if self.deepspeed or self.fsdp:
            raise UserError(
                "--deepspeed and --fsdp: PPO's four roles share one model here, which is not made to be sharded; "
                "--load_in_4bit makes it smaller"
            )
        if self.optim.startswith(("galore", "apollo", "lomo", "adalomo")):
            raise UserError(
                "--optim: GaLore, APOLLO and LOMO choose their parameters, and RL has two sets: take another"
            )
        if self.neftune_noise_alpha is not None:
            raise UserError(
                "--neftune_noise_alpha: with noise in the embeddings PPO's ratio would not be that of two policies: "
                "leave it out"
            )

    def _check_ranges(self):
        positive = "clip_range", "value_clip_range", "kl_target", "kl_horizon", "reward_clip", "target_kl"
        expect(self, "a number above 0", lambda x: x > 0, *positive, "critic_learning_rate")
        expect(self, "a finite number above 0", lambda x: 0 < x < math.inf, "temperature")
        from_zero = "init_kl_coef", "value_coef", "critic_warmup", "min_target_length"
        expect(self, "a number from 0 on", lambda x: 0 <= x < math.inf, *from_zero)
        expect(self, "a finite number", math.isfinite, "reward_baseline", "missing_eos_penalty")
        expect(self, "a number from 0 to 1", lambda x: 0 <= x <= 1, "gamma", "gae_lambda")
        if self.critic_warmup >= self.max_steps:
            logger.warning(f"--critic_warmup {self.critic_warmup} covers all rollouts: the policy is not trained")

    def _check_saves_of_the_best(self):
        """Before transformers does, which counts optimizer steps."""
        if not (self.load_best_model_at_end and self.save_strategy == "steps" and self.eval_steps):
            return
        if self.whole_rollouts(self.save_steps) % self.whole_rollouts(self.eval_steps):
            raise UserError(
                f"--save_steps {self.save_steps:g} is not a multiple of --eval_steps {self.eval_steps:g}, and "
                "--load_best_model_at_end needs an evaluation at each save"
            )

    def finish(self, trainer, data_args) -> None:
        super().finish(trainer, data_args)
        if trainer.server:
            trainer.server.close()

    def whole_rollouts(self, every: float) -> float:
        """Rollouts, rounded up: below 1 a share of all of them, as transformers means it."""
        if not every > 0:  # also NaN: refused by name with the other flags
            return every
        return math.ceil(round(every * self.rollouts if every < 1 else every, 6))

    @property
    def steps_between_saves(self) -> int:
        return self.steps_per_rollout

    @property
    def steps_per_rollout(self) -> int:
        return self.ppo_epochs * (self.batch_size // self.mini_batch_size)


def build_dataset(rows: Dataset, tokenizer, data_args: DataArguments) -> Dataset:
    """Rows {"prompt": messages, "record", "input_ids", "source_tokens"}."""

    def encode(row):
        return data_args.encode_prompt(tokenizer, row["prompt"])

    return data_args.tokenize(rows, encode, tokenizer, keep=("prompt", "record"))


# PPO's arithmetic: pure functions of tensors [batch, time]; mask is 1 on response tokens


def token_rewards(logp, ref_logp, scores, mask, kl_coef: float):
    """-kl_coef (logp - ref_logp) at every token, and the answer's score [batch] at its last.

    The tokens of an answer begin in column 0 of the mask, as `collate` puts them.
    """
    last = mask.sum(1, keepdim=True).long() - 1
    return (-kl_coef * (logp - ref_logp)).scatter_add(1, last, scores.unsqueeze(1)) * mask


def advantages_and_returns(rewards, values, mask, gamma: float, lam: float):
    """Generalised advantage estimation over the masked stretch of each row; zero elsewhere.

    delta_t = r_t + gamma V_(t+1) - V_t;  A_t = delta_t + gamma lam A_(t+1);  return = A + V.
    """
    advantages = torch.zeros_like(rewards)
    following = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = following = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def whiten(x, mask):
    """Mean 0, variance 1 (Bessel-corrected) over the mask; zero elsewhere."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = (((x - mean) * mask) ** 2).sum() / (count - 1).clamp(min=1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def policy_loss(logp, old_logp, advantages, mask, clip: float):
    """Sum over response tokens of max(-A rho, -A clip(rho, 1-clip, 1+clip))."""
    ratio = torch.exp(logp - old_logp)
    return (mask * torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))).sum()


def value_loss(values, old_values, returns, mask, clip: float):
    """Half the sum over response tokens of the larger squared error, with and without clipping the value's move."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * (mask * torch.max((values - returns) ** 2, (clipped - returns) ** 2)).sum()


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect critic, 0 one that says nothing."""
    kept = mask.bool()
    if kept.sum() < 2:  # no variance, and NaN would be no JSON
        return torch.zeros(())
    return 1 - (returns - values)[kept].var() / returns[kept].var().clamp(min=1e-8)


def adapted_kl_coef(coef: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """Proportional controller of Ziegler et al. (arXiv 1909.08593): at most +-20% of the error counts."""
    return coef * (1 + max(-0.2, min(0.2, kl / target - 1)) * samples / horizon)


def prompt_order(prompts: int, per_rollout: int, rollouts: int, repeats: int, seed: int) -> list[int]:
    """Indices for a sequential sampler: each rollout's prompts `repeats` times in a row, reshuffled every pass."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < per_rollout * rollouts:
        order += torch.randperm(prompts, generator=generator).tolist()
    starts = range(0, per_rollout * rollouts, per_rollout)
    return [index for start in starts for _ in range(repeats) for index in order[start : start + per_rollout]]


def assistant_turn(answer: dict) -> list[dict]:
    return [{"role": "assistant", "content": answer["text"]}]


def as_rows(rows: list[dict]) -> dict[str, list[dict]]:
    """A batch as it is; the trainer makes tensors of its answers. By name, for loader processes that are spawned."""
    return {"rows": rows}


class PPOTrainer(LogLine, EndsOnce, Trainer):
    """transformers.Trainer whose training steps take mini-batches from a rollout that it samples itself.

    An answer is a dict: row (its prompt's index on its rank), prompt and ids (tokens), text, finished, score, and one
    number a token in the tensors logp, ref_logp, entropy, values, advantages, returns. Every rank holds the answers of
    all. Checkpoints fall between rollouts, so a resumed run samples and learns as the uninterrupted one does.
    """

    def __init__(self, *args, data_args, reward_args, guard_args, reward_model=None, server=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.autocast = self.accelerator.autocast
        if self.args.do_eval and len(self.eval_dataset) < self.args.world_size:
            raise UserError(
                f"{len(self.eval_dataset)} held-out prompts for {self.args.world_size} processes: add some"
            )
        self.data_args, self.guards, self.server = data_args, guard_args, server
        self.reward_model = reward_model and reward_model.to(self.args.device)
        self.reward_functions, self.reward_weights = reward_args.functions, reward_args.weights()
        self.kl_coef, self.history = self.args.init_kl_coef, []
        self.score_scale, self.score_center = 0.0, 0.0  # a scale of 0 is not known yet
        self.rollout: list[dict] = []  # the answers that are being learned from
        self.stats: list[dict] = []  # figures since the last log
        self.good: list[torch.Tensor] = []  # trained weights of the last rollout without an alarm
        self.policy_stopped = False  # for the rest of this rollout: --early_stopping, --critic_warmup
        self.stopped = False  # by a guard, for good
        self.reference_scores: list[float] = []
        self.function_metrics: list[dict[str, float]] = []  # what reward functions log
        self.end_id = trained_end(self.processing_class)
        self.eos_ids = data_args.eos_ids(self.model.policy, self.processing_class)
        if self.args.do_train:
            each = self.args.steps_per_rollout
            logger.info(f"{self.args.rollouts} rollouts of {each} optimizer steps, which log and checkpoints count")
        self.model.eval()
        with self.model.role("policy") as policy, self.accelerator.autocast():
            some = self.train_dataset[:64]["input_ids"]
            self.pads = bool(server) or takes_padding(policy, self.processing_class, some)

    def _get_train_sampler(self, dataset=None):
        per_rollout = self.args.batch_size * self.args.world_size
        repeats = self.args.steps_per_rollout
        return prompt_order(len(self.train_dataset), per_rollout, self.args.rollouts, repeats, self.args.order_seed)

    def create_optimizer(self, model=None):
        """Adam as the Trainer has it, which decays no norms and biases, with a learning rate for the critic."""
        args, decaying = self.args, set(self.get_decay_parameter_names(self.model))
        decays = {id(parameter) for name, parameter in self.model.named_parameters() if name in decaying}
        rates = args.learning_rate, args.critic_learning_rate or 2 * args.learning_rate
        groups = [
            {"params": chosen, "lr": rate, "weight_decay": weight_decay}
            for params, rate in zip(self.model.trained(), rates, strict=True)
            for weight_decay, wanted in ((args.weight_decay, True), (0.0, False))
            if (chosen := [parameter for parameter in params if (id(parameter) in decays) == wanted])
        ]
        kind, settings = self.get_optimizer_cls_and_kwargs(args, self.model)
        self.optimizer = kind(groups, **settings)
        return self.optimizer

    # rollout

    def generate(self, role: str, prompts: list[list[int]], seeds: list[str]) -> list[list[int]]:
        """One sampled answer per prompt, up to and with its eos."""
        args, most = self.args, self.data_args.max_target_length
        together = chunks(prompts, 8 * args.micro_batch_size, self.pads)  # no activations are kept here
        numbers = uniforms(seeds, most).to(args.device)
        bar = self.bar("Sampling tokens", len(together) * most)
        with self.model.role(role) as model, self.accelerator.autocast(), bar:
            return sample_answers(
                model, self.processing_class, prompts, numbers, self.decoding(), args.temperature, together, bar
            )

    def generate_on_server(self, role: str, prompts: list[list[int]], seeds: list[str]) -> list[dict]:
        """`generate` on the server: {"ids", "sampler_logp"} per prompt."""
        name = self.server.base
        if role == "policy":
            with self.accelerator.main_process_first():
                if self.is_world_process_zero():
                    self.server.load(self.model.policy)
            (name,) = broadcast_object_list([self.server.policy])
        limits = {"max_tokens": self.data_args.max_target_length, "min_tokens": self.args.min_target_length}
        limits |= {"temperature": self.args.temperature, "stop_token_ids": sorted(self.eos_ids)}
        return self.server.sample(name, prompts, [random.Random(seed).getrandbits(31) for seed in seeds], **limits)

    def bar(self, what: str, total: int) -> tqdm:
        """A progress bar for what the trainer's own does not count; it disappears when done."""
        quiet = self.args.disable_tqdm or not self.is_world_process_zero()
        return tqdm(desc=what, total=total, disable=quiet, leave=False, mininterval=1.0)

    def decoding(self) -> GenerationConfig:
        """Greedy, for InverseTransformSampling leaves one token to choose; and without the model's own settings."""
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=self.data_args.max_target_length,
            min_new_tokens=self.args.min_target_length,
            eos_token_id=self.eos_ids,
            pad_token_id=self.processing_class.pad_token_id,
        )

    def micro_batches(self, answers: list[dict]) -> Iterator[tuple[list[dict], dict[str, torch.Tensor]]]:
        """The answers with their batches, those of similar length together: less padding."""
        by_length = sorted(answers, key=lambda answer: len(answer["prompt"]) + len(answer["ids"]))
        for start in range(0, len(answers), self.args.micro_batch_size):
            chosen = by_length[start : start + self.args.micro_batch_size]
            yield chosen, collate(chosen, self.processing_class.pad_token_id, self.args.device)

    def model_scores(self, answers: list[dict], rows: list[dict], frozen, last) -> list[float] | None:
        """The reward model's scores, if there is one: a reward adapter's from its states `frozen` [batch, time, size]
        in the columns `last` [batch]."""
        if self.reward_model is not None:
            conversations = [row["prompt"] + assistant_turn(answer) for row, answer in zip(rows, answers, strict=True)]
            finished = [answer["finished"] for answer in answers]
            return self.reward_model(conversations, finished).tolist()  # in the dtype it was loaded in
        if self.model.reward_head is not None:
            return self.model.reward_head(at_columns(frozen, last.unsqueeze(1))).flatten().tolist()
        return None

    def function_scores(self, answers: list[dict], rows: list[dict]) -> dict[str, list[float]]:
        """Each reward function's scores of all answers of this rank, which it gets at once, in the prompts' order."""
        records = [json.loads(row["record"]) for row in rows] if self.reward_functions else []
        columns = {key: [record.get(key) for record in records] for key in {k for record in records for k in record}}
        columns |= {"prompts": [row["prompt"] for row in rows], "completions": list(map(assistant_turn, answers))}
        columns |= {"completion_ids": [answer["ids"] for answer in answers], "trainer_state": self.state}
        columns |= recorders(answers, self.function_metrics)
        return {name: function_scores(name, function, columns) for name, function in self.reward_functions.items()}

    def sample(self, role: str, rows: list[dict], seeds: list[str]) -> list[dict]:
        """This rank's answers to its `rows`, with what sampling knows of them: prompt, ids, text, finished."""
        self.model.eval()
        prompts = [row["input_ids"] for row in rows]
        if self.server:
            found = self.generate_on_server(role, prompts, seeds)
        else:
            found = [{"ids": ids} for ids in self.generate(role, prompts, seeds)]
        for i, (prompt, answer) in enumerate(zip(prompts, found, strict=True)):
            answer |= {"row": i, "prompt": prompt, "finished": answer["ids"][-1] in self.eos_ids}
            answer["text"] = self.processing_class.decode(answer["ids"], skip_special_tokens=True)
        return found

    @torch.no_grad()
    def judge(self, answers: list[dict], rows: list[dict], critic: bool = False) -> list[dict]:
        """The answers of all ranks in order, with log-probabilities and scores; with values if `critic`."""
        bar, temperature = self.bar("Scoring answers", len(answers)), self.args.temperature
        for chosen, batch in self.micro_batches(answers):
            seen = dict(zip(("logp", "entropy"), self.model.token_logp("policy", batch, temperature), strict=True))
            head_alone, frozen = critic and not self.model.trains_critic_body, None
            read, last = as_trained(batch["ids"], chosen, self.end_id, self.processing_class.pad_token_id)
            if head_alone and self.model.frozen_role == "reference":
                seen["ref_logp"], frozen = self.model.reference(batch, temperature)
            else:
                seen["ref_logp"], _ = self.model.token_logp("reference", batch, temperature)
                if head_alone or self.model.reward_head is not None:  # one pass for both
                    frozen = self.model.hidden(self.model.frozen_role, read)
            if head_alone:
                seen["states"] = batch["states"] = at_columns(frozen, batch["columns"])
            if critic:
                seen["values"] = self.model.token_values(batch)
            scores = self.model_scores(chosen, [rows[answer["row"]] for answer in chosen], frozen, last)
            for i, answer in enumerate(chosen):
                answer |= {name: tensor[i, : len(answer["ids"])].cpu() for name, tensor in seen.items()}
                answer["scores"] = {"model": scores[i]} if scores else {}
            bar.update(len(chosen))
        bar.close()
        of_functions = self.function_scores(answers, rows)
        for i, answer in enumerate(answers):
            answer["scores"] |= {name: values[i] for name, values in of_functions.items()}
            answer["score"] = sum(self.reward_weights[name] * value for name, value in answer["scores"].items())
        self.function_metrics = gather_object(self.function_metrics)
        return gather_object(answers)

    def take_function_metrics(self) -> dict[str, float]:
        """Means of what the reward functions logged since the last call."""
        rows, self.function_metrics = self.function_metrics, []
        return means(rows)

    @contextmanager
    def timed(self, phase: str):
        """Add the seconds spent inside to what is logged."""
        started = time.perf_counter()
        yield
        self.stats.append({f"seconds_{phase}": time.perf_counter() - started})

    def collect(self, rows: list[dict], number: int) -> None:
        """Sample rollout `number` and give every token its advantage and return."""
        args, first = self.args, self.args.process_index * len(rows)
        seeds = [f"{args.seed} rollout {number} answer {first + i}" for i in range(len(rows))]
        with self.timed("generate"):
            answers = self.sample("policy", rows, seeds)
        with self.timed("score"):
            self.rollout = self.judge(answers, rows, critic=True)
        without_states = [{k: v for k, v in answer.items() if k != "states"} for answer in self.rollout]
        batch = collate(without_states, self.processing_class.pad_token_id, "cpu")
        mask, scores = batch["answer_mask"], torch.tensor([answer["score"] for answer in self.rollout])
        unfinished = torch.tensor([not answer["finished"] for answer in self.rollout])
        scores = self.scaled_and_clipped(scores - args.reward_baseline) - args.missing_eos_penalty * unfinished
        rewards = token_rewards(batch["logp"], batch["ref_logp"], scores, mask, self.kl_coef)
        advantages, returns = advantages_and_returns(rewards, batch["values"], mask, args.gamma, args.gae_lambda)
        advantages = whiten(advantages, mask) if args.whiten_advantages else advantages
        for i, answer in enumerate(self.rollout):
            n = len(answer["ids"])
            answer |= {"advantages": advantages[i, :n], "returns": returns[i, :n]}
        self.history.append(describe(self.rollout, self.reward_weights))
        seen = {"kl": mean_kl(self.rollout, args.kl_estimator), "kl_coef": self.kl_coef}
        if self.server:
            seen["sampler_difference"] = sampler_difference(self.rollout, args.min_target_length)
        seen["explained_variance"] = explained_variance(batch["values"], returns, mask).item()
        self.stats.append(self.take_function_metrics() | self.history[-1] | seen)
        if args.adap_kl_ctrl:
            kl = self.history[-1]["kl"]
            self.kl_coef = adapted_kl_coef(self.kl_coef, kl, args.kl_target, len(self.rollout), args.kl_horizon)

    def scaled_and_clipped(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [answers] as PPO learns from them. The first rollout that has a spread sets scale and center."""
        args = self.args
        if args.use_score_scaling and not self.score_scale:
            spread = scores.std(correction=0).item()
            equal = spread < 1e-6 * scores.abs().max()  # but for rounding, which this would blow up
            self.score_scale = 0.0 if equal else spread
            self.score_center = scores.mean().item() / (self.score_scale or 1.0)
        scores = scores / (self.score_scale or 1.0)
        lowest, highest = self.score_center - args.reward_clip, self.score_center + args.reward_clip
        if (beyond := ((scores < lowest) | (scores > highest)).float().mean()) > 0.5:
            logger.warning(
                f"{beyond:.0%} of the scores lie outside of {lowest:.3g} to {highest:.3g} (--reward_clip) and are "
                "clipped to it: see --reward_baseline"
            )
        return scores.clamp(lowest, highest)

    # update

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        self.count_tokens(0)  # starts the clock alone: sampling and updating have times of their own
        args = self.args
        number, step = divmod(self.state.global_step, args.steps_per_rollout)
        if step == 0:
            self.collect(inputs["rows"], number)
            self.policy_stopped = number < args.critic_warmup
            alarms = self.guards.alarms(self.history, len(self.rollout))
            if self.guards.stop_for(alarms, self.state.global_step, args.output_dir):
                return self.stop()
            if not all(answer["advantages"].isfinite().all() for answer in self.rollout):
                reason = alarms.get("not_finite", "a value of the critic is not finite")
                raise Fault(f"{reason}: nothing of rollout {number + 1} was learned; earlier checkpoints are whole")
            self.good = [parameter.detach().clone() for parameter in sum(self.model.trained(), [])]
        size = args.mini_batch_size * args.world_size
        epoch, part = divmod(step, len(self.rollout) // size)
        shuffled = random.Random(f"{args.seed} rollout {number} epoch {epoch}").sample(self.rollout, len(self.rollout))
        self.model.train()
        with self.timed("update"):
            loss = self.update(shuffled[part * size : (part + 1) * size])
        looks = self.accelerator.scaler is None  # which skips steps itself; and each look waits for the GPU
        finite = not looks or all(parameter.grad.isfinite().all() for parameter in self.with_gradients())
        broken = {} if finite else {"not_finite": "a gradient is not finite"}
        if self.guards.stop_for(broken, self.state.global_step, args.output_dir):
            return self.stop()
        return loss

    def update(self, answers: list[dict]) -> torch.Tensor:
        """Gradients of one mini-batch. Losses are means over the tokens of all its answers, on all ranks."""
        args, sums = self.args, torch.zeros(3, device=self.args.device)
        policy, value, moved = sums  # its parts, in place
        tokens = sum(len(answer["ids"]) for answer in answers)
        for _, batch in self.micro_batches(answers[args.process_index :: args.world_size]):
            mask = batch["answer_mask"]
            if not self.policy_stopped:  # forward and backward of one role before the next takes the base
                logp, _ = self.model.token_logp("policy", batch, args.temperature)
                loss = policy_loss(logp, batch["logp"], batch["advantages"], mask, args.clip_range) / tokens
                self.accelerator.backward(loss)
                policy += loss.detach()
                moved += ((batch["logp"] - logp.detach()) * mask).sum() / tokens
            values = self.model.token_values(batch)
            loss = value_loss(values, batch["values"], batch["returns"], mask, args.value_clip_range) / tokens
            self.accelerator.backward(args.value_coef * loss)
            value += loss.detach()
        if args.world_size > 1:  # shares of a global mean add up; DDP's own mean over ranks is not used
            for parameter in self.with_gradients():
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")
        policy, value, moved = self.accelerator.reduce(sums, reduction="sum").tolist()
        self.stats.append({"value_loss": value})
        if not self.policy_stopped:
            self.stats[-1] |= {"policy_loss": policy, "step_kl": moved}
        if args.early_stopping:
            self.stats[-1]["policy_stopped"] = float(self.policy_stopped)
        self.policy_stopped |= args.early_stopping and moved > 1.5 * args.target_kl
        return torch.tensor(policy + args.value_coef * value, device=args.device)

    def with_gradients(self) -> list[nn.Parameter]:
        return [parameter for parameter in sum(self.model.trained(), []) if parameter.grad is not None]

    @torch.no_grad()
    def stop(self) -> torch.Tensor:
        """End training with the weights that sampled the last rollout that no guard stopped."""
        trained = sum(self.model.trained(), [])
        for parameter, good in zip(trained, self.good or trained, strict=True):
            parameter.copy_(good)
            parameter.grad = torch.zeros_like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # the step that follows moves nothing
        if self.accelerator.scaler is not None:  # it gets a scale at its first use, and the step needs one
            self.accelerator.scaler.scale(torch.zeros((), device=self.args.device))
        self.control.should_training_stop = self.stopped = True
        return torch.zeros((), device=self.args.device)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.stopped:  # a run resumed from a checkpoint saved now would train past its guard
            self.control.should_save = self.control.should_evaluate = False  # an evaluation may save a best one
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # evaluation, logging, saving

    def log(self, logs: dict[str, float], *args, **kwargs):
        if "loss" in logs and self.stats:
            logs |= means(self.stats)
            if "seconds_update" in logs:  # of a rollout, not of one optimizer step
                logs["seconds_update"] *= self.args.steps_per_rollout
            self.stats = []
        if "train_samples_per_second" in logs:  # of the whole run: transformers counts an answer once for each step
            logs["train_samples_per_second"] /= self.args.steps_per_rollout
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample one answer per held-out prompt, with the same random numbers each time; all ranks share the work."""
        rows = list(eval_dataset or self.eval_dataset)
        answers = self.answer_all("policy", rows)
        found = self.take_function_metrics()
        if len(self.reference_scores) != len(rows):  # a policy that has not moved yet is the reference
            moved = any(not torch.equal(answer["logp"], answer["ref_logp"]) for answer in answers)
            reference = self.answer_all("reference", rows) if moved else answers
            self.reference_scores = [answer["score"] for answer in reference]
            self.take_function_metrics()  # what the functions logged of the reference is not wanted
        wins = win_rate([answer["score"] for answer in answers], self.reference_scores)
        found |= describe(answers, self.reward_weights) | {"win_rate": wins, "prompts": len(rows)}
        found["kl"] = mean_kl(answers, self.args.kl_estimator)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)  # reopens TensorBoard's file, which the end of training closed
        self.show(rows, answers)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def answer_all(self, role: str, rows: list[dict]) -> list[dict]:
        seeds = [f"{self.args.seed} evaluation answer {i}" for i in range(len(rows))]
        with self.accelerator.split_between_processes(list(zip(rows, seeds, strict=True))) as mine:
            rows, seeds = map(list, zip(*mine, strict=True))
            return self.judge(self.sample(role, rows, seeds), rows)

    def show(self, rows: list[dict], answers: list[dict], count: int = 4) -> None:
        """The first held-out prompts with their answers: to samples.jsonl, to TensorBoard and to the log."""
        if not self.is_world_process_zero():
            return
        step, shown = self.state.global_step, list(zip(rows, answers, self.reference_scores, strict=True))[:count]
        folder, lines = Path(self.args.output_dir), []
        for row, answer, reference in shown:
            line = {"step": step, "prompt": row["prompt"], "answer": answer["text"], "score": answer["score"]}
            lines.append(answer.get("extra", {}) | line | {"reference_score": reference})
            logger.info(f"{row['prompt'][-1]['content']!r} -> {answer['text']!r} (score {answer['score']:.2f})")
        append_step(folder / "scores.jsonl", [{"step": step, "scores": [answer["score"] for answer in answers]}])
        append_step(folder / "samples.jsonl", lines)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer:
                for i, (row, answer, _) in enumerate(shown):
                    text = f"{row['prompt'][-1]['content']}\n\n{answer['text']}\n\nscore {answer['score']:.3f}"
                    callback.tb_writer.add_text(f"samples/{i}", text, step)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save(folder)
        state = {"kl_coef": self.kl_coef, "score_scale": self.score_scale, "score_center": self.score_center}
        state |= {"history": self.history, "steps_per_rollout": self.args.steps_per_rollout}
        (folder / "value" / "state.json").write_text(json.dumps(state))
        self.processing_class.save_pretrained(folder)
        if self.good and folder != Path(self.args.output_dir):  # in a checkpoint: for a guard that fires after it
            save_file({str(i): good for i, good in enumerate(self.good)}, folder / "good.safetensors")
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        folder, steps = Path(resume_from_checkpoint), self.args.steps_per_rollout
        state = json.loads((folder / "value" / "state.json").read_text())
        if (then := state.get("steps_per_rollout", steps)) != steps:
            raise UserError(
                f"{folder} was trained with {then} optimizer steps a rollout, and these flags make {steps}: give the "
                "same --batch_size, --mini_batch_size and --ppo_epochs again, or start over (--fresh)"
            )
        self.model.load(folder)
        self.kl_coef, self.score_scale, self.history = (state[k] for k in ("kl_coef", "score_scale", "history"))
        self.score_center = state.get("score_center", 0.0)  # an older version had none
        if (folder / "good.safetensors").exists():
            good = load_file(folder / "good.safetensors")
            self.good = [good[str(i)].to(self.args.device) for i in range(len(good))]

    def _load_best_model(self) -> None:
        if self.stopped:  # the policy that set off the guard may have the highest reward of all
            return
        logger.info(f"Taking the policy of {self.state.best_model_checkpoint}, best by {self.state.best_metric:.4f}")
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def main():
    model_args, adapter_args, data_args, reward_args, guard_args, training_args = parse_arguments(
        ModelArguments, AdapterArguments, DataArguments, RewardSourceArguments, GuardArguments, PPOArguments
    )
    set_seed(training_args.seed)
    if training_args.min_target_length > data_args.max_target_length:
        raise UserError(f"--min_target_length {training_args.min_target_length} is above --max_target_length")
    reward_args.check_output(training_args.output_dir)
    if training_args.vllm_server and not adapter_args.use_peft:
        raise UserError("--vllm_server takes the policy as an adapter: leave --use_peft False out")
    model_args.check(data_args.longest, trains_all=not adapter_args.use_peft, output_dir=training_args.output_dir)
    # on a CPU the weights are float32 even under bf16, too coarse there for log-probabilities
    precision = "fp32" if training_args.device.type == "cpu" else training_args.precision
    model_args.resolve_dtype(precision, trains_all=not adapter_args.use_peft)

    tokenizer = model_args.load_tokenizer()
    train_rows, eval_rows = data_args.load_prompts(training_args.output_dir)
    train_dataset = build_dataset(train_rows, tokenizer, data_args)
    eval_dataset = build_dataset(eval_rows, tokenizer, data_args)
    if data_args.preview:
        return data_args.show(train_dataset, tokenizer)
    if training_args.plan:
        groups = model_args, adapter_args, training_args
        return plan_ppo(*groups, train_dataset, eval_dataset, data_args, reward_args)

    url, folder = training_args.vllm_server, Path(training_args.output_dir) / "vllm"
    server = RolloutServer(url, folder) if url else None
    model, reward_model = build_actor_critic(model_args, adapter_args, data_args, reward_args, training_args.critic)
    training_args.avoid_casts(model)

    trainer = PPOTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=as_rows,
        data_args=data_args,
        reward_args=reward_args,
        guard_args=guard_args,
        reward_model=reward_model,
        server=server,
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
