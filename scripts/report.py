"""The pipeline's closing table: every stage on held-out data, before and after; and three unseen prompts answered.

    python scripts/report.py outputs models/SmolLM2-135M-Instruct outputs/{pt,sft,rl}-merged

Reads all_results.json of outputs/pt, sft, rm and rl, quiz.json (of scripts/quiz.py), and the models: the base and
those that PT, SFT and RL made.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PROMPTS = 3
# stage, what is measured, key before, key after, what the count counts, its key
ROWS = (
    ("PT", "perplexity, unseen documents", "eval_perplexity_before", "eval_perplexity", "tokens", "eval_tokens"),
    ("SFT", "loss, unseen answers", "eval_loss_before", "eval_loss", "tokens", "eval_tokens"),
    ("RM", "accuracy, unseen pairs", "eval_accuracy_before", "eval_accuracy", "pairs", "eval_pairs"),
    ("RM", "margin, unseen pairs", "eval_margin_before", "eval_margin", "pairs", "eval_pairs"),
    ("RM", "accuracy of 'longer wins'", "eval_longer_wins", "eval_longer_wins", "pairs", "eval_pairs"),
    ("RL", "reward, unseen prompts", "eval_reward_before", "eval_reward", "prompts", "eval_prompts"),
    ("RL", "KL to the SFT model, nats", "eval_kl_before", "eval_kl", "prompts", "eval_prompts"),
    ("RL", "answer length, tokens", "eval_length_before", "eval_length", "prompts", "eval_prompts"),
    ("RL", "answers that end", "eval_eos_rate_before", "eval_eos_rate", "prompts", "eval_prompts"),
)


def print_table(outputs: Path) -> None:
    results = {
        stage: json.loads((outputs / stage.lower() / "all_results.json").read_text())
        for stage in dict.fromkeys(row[0] for row in ROWS)
    }
    print(f"\n{'':4} {'on held-out data':30} {'before':>9} {'after':>9}   n")
    for stage, what, before, after, unit, count in ROWS:
        found = results[stage]
        print(f"{stage:4} {what:30} {found[before]:9.3f} {found[after]:9.3f}   {found[count]} {unit}")
    kinds = sorted(k for k in results["RM"] if k.startswith("eval_accuracy_") and not k.endswith("_before"))
    for kind in kinds:
        what = f"accuracy, {kind.removeprefix('eval_accuracy_').replace('_', ' ')}"
        print(f"{'RM':4} {what:30} {results['RM'][kind + '_before']:9.3f} {results['RM'][kind]:9.3f}")
    (base, pt, sft), quiz = quiz_accuracies(outputs)
    for stage, before, after in (("PT", base, pt), ("SFT", pt, sft)):
        print(f"{stage:4} {'quiz accuracy (chance: 0.25)':30} {before:9.3f} {after:9.3f}   {quiz} questions")
    print(
        "\n     time per stage: "
        + ", ".join(
            f"{stage} {found['train_runtime']:.0f} s (peak {found['peak_rss_gib']:.1f} GiB)"
            for stage, found in results.items()
        )
    )


def quiz_accuracies(outputs: Path) -> tuple[list[float], int]:
    """Of the base, PT and SFT models, and over how many questions."""
    found = list(json.loads((outputs / "quiz.json").read_text()).values())
    return [row["accuracy"] for row in found], found[0]["questions"]


def unseen_prompts(outputs: Path) -> list[list[dict]]:
    """The first held-out prompts that the RL stage showed."""
    lines = (outputs / "rl" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:PROMPTS]]


@torch.no_grad()
def answers_to(prompts: list[list[dict]], model, tokenizer) -> list[str]:
    """The most likely answer to each, at most 64 tokens of it."""
    inputs = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=64, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    ids = model.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def main():
    outputs, base, _, sft, rl = Path(sys.argv[1]), *sys.argv[2:]
    print_table(outputs)
    prompts = unseen_prompts(outputs)
    answers = {}
    tokenizer = AutoTokenizer.from_pretrained(sft, padding_side="left")  # its template serves a base that has none
    for name, path in (("base", base), ("SFT", sft), ("RL", rl)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
        answers[name] = answers_to(prompts, model, tokenizer)
    for number, messages in enumerate(prompts):
        print(f"\n{messages[-1]['content']}")
        for name, texts in answers.items():
            print(f"  {name:5} {texts[number]}")


if __name__ == "__main__":
    main()
