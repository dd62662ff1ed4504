"""TRL 1.12's PPOTrainer for benchmarks/ppo.py, run in the environment with that TRL: python ppo_trl.py SETTINGS.json

Its phases are timed from outside: generation is its batch_generation, the update goes from there being advantages to
the log, and scoring is what lies between.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Clock:
    """Seconds of each phase of each rollout, by marks that the trainer passes."""

    def __init__(self):
        self.rollouts, self.last, self.phases = [], 0.0, {}

    def mark(self, phase: str | None):
        now = time.perf_counter()
        if phase:
            self.phases[f"seconds_{phase}"] = now - self.last
        self.last = now


class TimedPPOTrainer(PPOTrainer):
    clock: Clock

    def log(self, logs, *args, **kwargs):
        self.clock.mark("update")
        self.clock.rollouts.append(self.clock.phases | {"reward": logs["objective/scores"]})
        self.clock.phases = {}
        super().log(logs, *args, **kwargs)


def time_functions(clock: Clock) -> None:
    """Put marks around generation and behind the whitening, which ends the scoring."""
    generation, masked_whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def batch_generation(*args, **kwargs):
        clock.mark(None)
        found = generation(*args, **kwargs)
        clock.mark("generate")
        return found

    def whiten(*args, **kwargs):
        found = masked_whiten(*args, **kwargs)
        clock.mark("score")
        return found

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = batch_generation, whiten


def scorer(folder: str):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


def main():
    settings_file = Path(sys.argv[1])
    settings = json.loads(settings_file.read_text())
    tokenizer = AutoTokenizer.from_pretrained(settings["reward_model"], padding_side="left")
    prompts = json.loads(Path(settings["prompts"]).read_text())
    clock = Clock()
    time_functions(clock)
    trainer = TimedPPOTrainer(
        args=PPOConfig(
            output_dir=settings["output"],
            per_device_train_batch_size=settings["batch_size"],
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=settings["ppo_epochs"],
            total_episodes=len(prompts),
            response_length=settings["new_tokens"],
            local_rollout_forward_batch_size=settings["batch_size"],
            stop_token="eos",
            missing_eos_penalty=1.0,
            learning_rate=3e-4,
            temperature=1.0,
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32),
        ref_model=None,
        reward_model=scorer(settings["reward_model"]),
        value_model=scorer(settings["reward_model"]),
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:1]}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.clock = clock
    started = time.perf_counter()
    trainer.train()
    training = {"seconds": time.perf_counter() - started, "rollouts": clock.rollouts}
    settings_file.with_name("training.json").write_text(json.dumps(training))


if __name__ == "__main__":
    main()
