"""Stage 4 as a whole: what each role computes, where rewards come from, what must not change a run, and kills."""

import io
import json
import logging
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import transformers
from conftest import (
    ADAPTER,
    QUESTIONS,
    ROOT,
    assert_curves,
    history,
    in_process,
    in_subprocess,
    merge,
    results,
    stage,
    write_lines,
)
from loguru import logger
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import save_tiny_bert
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    FalconConfig,
)

import rl_training
from arguments.answers import mean_kl, means
from arguments.command_line import UserError
from arguments.data import DataArguments
from arguments.encoding import LengthArguments
from arguments.model import ModelArguments
from arguments.reward import RewardModel, RewardSourceArguments, is_own, pad_alike
from arguments.reward_functions import function_scores, load_functions, recorders
from arguments.roles import VALUE, as_trained, disable_dropout
from arguments.sampling import until_eos

# --- the roles of PPO


def make_trainer(monkeypatch, *command):
    """The trainer that the command's main() builds, taken where it would begin to train."""
    taken = []
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")  # main() sets it, for whatever runs after in this process
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    monkeypatch.setattr(rl_training.PPOTrainer, "train", lambda self, **_: taken.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        rl_training.main()
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")  # empty it would send a run later in the same test to ./runs
    return taken[0]


def written_answers(trainer, texts: tuple[str, ...]) -> list[dict]:
    """Answers as if the trainer had sampled `texts` to its first prompts."""
    ids = [trainer.processing_class(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompts = [trainer.train_dataset[i]["input_ids"] for i in range(len(texts))]
    found = zip(prompts, ids, texts, strict=True)
    return [{"prompt": prompt, "ids": i, "text": text, "finished": False} for prompt, i, text in found]


def test_roles_of_ppo(tiny, records, tmp_path, monkeypatch):
    """One base in memory: every role computes what it would alone, also after policy and value have moved."""
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    flags = ("--reward_model_name_or_path", tmp_path / "rm", "--precision", "fp32", "--use_cpu", "--critic", "adapter")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    with torch.no_grad():
        check_roles(trainer, tiny("llama"), tmp_path / "rm")


def test_any_optimizer_gets_both_rates(tiny, records, tmp_path, monkeypatch):
    reward = tmp_path / "length.py"
    reward.write_text("def length(completions, **_):\n    return [len(c[0]['content']) for c in completions]\n")
    flags = (
        "--reward_functions",
        f"{reward}:length",
        "--optim",
        "sgd",
        "--learning_rate",
        0.25,
        "--weight_decay",
        0.125,
    )
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.25, 0.125), (0.5, 0.125)]
    trainer.args.critic_learning_rate = 0.125
    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.25, 0.125]


def test_norms_and_biases_do_not_decay(tiny, records, tmp_path, monkeypatch):
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:spread", "--use_peft", "False", "--weight_decay", 0.125)
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("bloom"), records, tmp_path / "rl", *flags))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decay = {names[id(one)]: g["weight_decay"] for g in trainer.create_optimizer().param_groups for one in g["params"]}
    assert len(decay) == sum(map(len, trainer.model.trained()))
    plain = {name for name, rate in decay.items() if not rate}
    assert plain == {name for name in decay if "layernorm" in name or "ln_f" in name or name.endswith("bias")} != set()
    assert set(decay.values()) == {0.125, 0.0}


def test_seconds_of_updates_are_a_rollouts(tiny, records, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--ppo_epochs", 3, "--report_to", "none")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    trainer.stats, logs = [{"seconds_update": 1.0}, {"seconds_update": 3.0}, {"kl": 5.0}], {"loss": 0.0}
    trainer.log(logs)
    assert logs["seconds_update"] == 3 * (1 + 3) / 2 and logs["kl"] == 5.0
    logs = {"train_samples_per_second": 12.0}
    trainer.log(logs)
    assert logs["train_samples_per_second"] == 12 / 3, "an answer counts once, not once for each pass"


def read(trainer, batch, answers):
    """The reward adapter's hidden states of answers, and the columns of their scores."""
    ids, last = as_trained(batch["ids"], answers, trainer.end_id, trainer.processing_class.pad_token_id)
    return trainer.model.hidden("reward", ids), last


def check_roles(trainer, llama: str, adapter: Path) -> None:
    trainer.model.eval()
    rows, pad = [trainer.train_dataset[i] for i in range(4)], trainer.processing_class.pad_token_id
    answers = written_answers(trainer, ("Fever.", "休息", "a" * 9, "At once"))
    (chosen, batch), *others = trainer.micro_batches(answers)
    assert not others and (batch["ids"] == pad).any(dim=1).sum() == 3, "this test needs padded rows"

    for name, parameter in trainer.model.named_parameters():  # as if trained for long
        if parameter.requires_grad and ("default" in name or VALUE in name):
            parameter.add_(0.1 * torch.randn_like(parameter))

    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    ids, mask = batch["ids"], torch.zeros_like(batch["ids"])
    for i, answer in enumerate(chosen):
        mask[i, : len(answer["prompt"] + answer["ids"])] = 1
    places = mask.nonzero(as_tuple=True)
    expected = plain(input_ids=ids, attention_mask=mask).logits[places]
    torch.testing.assert_close(trainer.model.logits("reference", ids, *places), expected)
    states = plain.base_model(input_ids=ids).last_hidden_state
    assert torch.equal(trainer.model.hidden("reference", ids), states), "the reference is not the base, bit for bit"
    assert torch.equal(trainer.model.logits("reference", ids, *places), plain.lm_head(states[places]))
    logp, kept = trainer.model.reference(batch, 1.0)
    assert torch.equal(kept, states) and torch.equal(logp, trainer.model.token_logp("reference", batch, 1.0)[0])
    assert not torch.allclose(trainer.model.logits("policy", ids, *places), expected, atol=1e-2)

    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1, dtype=torch.float32)
    reward = PeftModel.from_pretrained(base, adapter).eval()
    alone = [reward(input_ids=torch.tensor([a["prompt"] + a["ids"]])).logits.item() for a in answers]
    singles = []
    for answer, row in zip(answers, rows, strict=True):
        _, single = next(trainer.micro_batches([answer]))
        singles += trainer.model_scores([answer], [row], *read(trainer, single, [answer]))
    together = [
        dict(zip(map(id, chosen), trainer.model_scores(chosen, rows, *read(trainer, batch, chosen)), strict=True))
        for chosen, batch in trainer.micro_batches(answers)
    ]
    together = [together[0][id(answer)] for answer in answers]
    assert together == pytest.approx(singles, abs=1e-5)
    assert together == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in alone}) > 1, "this test needs scores that differ"


@pytest.mark.parametrize("pad", ["its own", "eos"])
def test_where_a_score_is_read(pad, tiny, records, tmp_path, monkeypatch):
    """Of stage 3's reward models at the answer's end token, beside the policy as on its base; of others where any
    library reads it, at the last token of what the template makes of the conversation."""
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm", "--max_steps", 20)).ok()
    flags = ("--reward_model_name_or_path", tmp_path / "rm", "--precision", "fp32", "--use_cpu")
    flags += ("--max_target_length", 64)
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    tokenizer, rows = trainer.processing_class, list(trainer.train_dataset)[:3]
    made = written_answers(trainer, ("Rest.", "Drink water and rest.", "发热时看医生。"))
    for answer in made:
        answer["ids"].append(tokenizer.eos_token_id)
    monkeypatch.setattr(trainer, "generate", lambda *_: [answer["ids"] for answer in made])
    shared = trainer.judge(trainer.sample("policy", rows, ["0", "1", "2"]), rows)
    assert all(answer["finished"] for answer in shared)

    others = [tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("a"), tokenizer.eos_token_id]
    trainer.eos_ids = sorted({*trainer.eos_ids, *others})  # as Qwen's and Llama 3's models have several ends
    assert len(set(others)) == 3
    for answer, end in zip(made, others, strict=True):
        answer["ids"][-1] = end
    ended = trainer.judge(trainer.sample("policy", rows, ["0", "1", "2"]), rows)
    assert [answer["score"] for answer in ended] == [answer["score"] for answer in shared]
    assert ended[0]["logp"][-1] != shared[0]["logp"][-1], "the policy is judged by what it sampled"

    tokenizer.pad_token = {"its own": tokenizer.pad_token, "eos": tokenizer.eos_token}[pad]
    base = AutoModelForSequenceClassification.from_pretrained(tiny("llama"), num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "rm").eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    turns = [row["prompt"] + rl_training.assistant_turn(answer) for row, answer in zip(rows, shared, strict=True)]
    texts = [tokenizer.apply_chat_template(messages, return_dict=False) for messages in turns]
    assert all(tokenizer.decode(ids).endswith(f"{tokenizer.eos_token}\n") for ids in texts)
    with torch.no_grad():
        elsewhere = [model(torch.tensor([ids])).logits.item() for ids in texts]
        assert RewardModel(model, tokenizer, trainer.data_args)(turns).tolist() == pytest.approx(elsewhere, abs=1e-5)
        if pad == "its own":
            own = RewardModel(model, tokenizer, trainer.data_args, own=True)(turns).tolist()
            assert own == pytest.approx([answer["score"] for answer in shared], abs=1e-5)
            assert max(abs(a - b) for a, b in zip(own, elsewhere, strict=True)) > 0.01, "this test needs two places"
    assert len({round(score, 4) for score in elsewhere}) == 3, "this test needs scores that differ"


@pytest.mark.parametrize(
    ("files", "own"),
    [
        ({}, False),
        ({"base.json": "{}"}, True),
        ({"run.json": "{}"}, True),
        ({"merge.json": '{"trained_here": true}'}, True),
        ({"merge.json": "{}"}, True),  # of an older version
        ({"merge.json": '{"trained_here": false}', "run.json": "{}"}, False),
    ],
)
def test_who_trained_a_reward_model(files, own, tmp_path):
    """By what lies beside it: in a folder, or in the hub's cache."""
    snapshot = tmp_path / "models--me--judge" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--judge" / "refs").mkdir()
    (tmp_path / "models--me--judge" / "refs" / "main").write_text("1")
    for name, text in files.items():
        (snapshot / name).write_text(text)
    assert is_own(snapshot) is own and is_own("me/judge", str(tmp_path)) is own
    assert not is_own("me/nobody", str(tmp_path))


def test_an_adapter_of_another_library_is_read_beside_the_policy(tiny, records, tmp_path, monkeypatch, capsys):
    """On the policy's own base, too: PPO's rows stop at an answer's end."""
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    flags = ("--reward_model_name_or_path", tmp_path / "rm", "--precision", "fp32", "--use_cpu")
    for file in ("base.json", "run.json"):
        (tmp_path / "rm" / file).unlink()
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    assert "was not trained by stage 3: loaded beside the policy" in capsys.readouterr().err
    assert trainer.model.reward_head is None and not trainer.reward_model.own
    for file in [*(tmp_path / "rm").glob("token*"), *(tmp_path / "rm").glob("*.jinja")]:
        file.unlink()  # peft alone saves none
    told = io.StringIO()
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [logging.StreamHandler(told)])
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    bases = AutoTokenizer.from_pretrained(tiny("llama"))
    assert trainer.reward_model.tokenizer.get_vocab() == bases.get_vocab()
    assert trainer.reward_model.tokenizer.chat_template == bases.chat_template
    assert "score.weight" not in told.getvalue(), "the base has no head, but the adapter brings it"


def test_first_rollout_is_the_reference(tiny, records, tmp_path):
    """The KL before any update is exactly zero, also in bfloat16; and what the base asks for when it samples stays."""
    base = tiny("llama")
    generation = (Path(base) / "generation_config.json").read_bytes()
    in_process(*stage("rm", base, records, tmp_path / "rm")).ok()
    for precision in ("fp32", "bf16"):
        output = tmp_path / f"rl-{precision}"
        flags = ("--reward_model_name_or_path", tmp_path / "rm", "--precision", precision, "--eval_on_start")
        in_process(*stage("rl", base, records, output, *flags, "--max_steps", 2)).ok()
        assert_curves(output, "loss", "reward", "kl", "length", "entropy")
        first, second = history(output, "kl")
        assert first == 0.0 and second != 0.0
        assert results(output)["eval_kl_before"] == 0.0 != results(output)["eval_kl"]
        assert all(path.parent.name.startswith("checkpoint-") for path in output.glob(f"*/{ADAPTER}")), "of the policy"
    in_process(*merge(base, output, tmp_path / "rl-merged")).ok()
    assert (Path(base) / "generation_config.json").read_bytes() == generation
    for folder in (base, tmp_path / "rl-merged"):
        asked = json.loads((Path(folder) / "generation_config.json").read_text())
        assert (asked["do_sample"], asked["top_k"], asked["temperature"]) == (True, 5, 0.2)


def copied(model: str, folder: Path, **settings) -> Path:
    """A copy of a model with other settings in its config."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("family", "dropout"), [("gpt2", {}), ("llama", {"attention_dropout": 0.5}), ("falcon", {"hidden_dropout": 0.5})]
)
def test_nothing_is_dropped_in_an_update(family, dropout, checkpointing, tiny, records, tmp_path, monkeypatch):
    """The first mini-batch is a whole rollout, from the weights that sampled it: the ratio is exactly 1."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}  # its layers drop, not parts of them
    falcon = FalconConfig, size, tiny_models.FAMILIES["bloom"][2]
    monkeypatch.setitem(tiny_models.FAMILIES, "falcon", falcon)
    base = copied(tiny(family), tmp_path / family, **dropout)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--precision", "fp32", "--ppo_epochs", 1)
    flags += ("--critic", "adapter", "--activation_checkpointing", checkpointing)
    in_process(*stage("rl", base, records, tmp_path / "rl", *flags)).ok()
    assert history(tmp_path / "rl", "step_kl")[0] == 0.0
    assert max(w.abs().max() for name, w in load_file(tmp_path / "rl" / ADAPTER).items() if "lora_B" in name) > 0


def test_dropout_rates_in_a_config_are_not_saved_as_zero():
    config = FalconConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, hidden_dropout=0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    disable_dropout(model)
    ids = torch.arange(8).unsqueeze(0)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.hidden_dropout == model.base_model.config.hidden_dropout == 0.5


def test_prompts_that_padding_would_change_are_sampled_apart(records, tmp_path, monkeypatch, logged):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    base = tiny_models.save_tiny_recurrent(tmp_path / "base")
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--precision", "fp32")
    trainer = make_trainer(monkeypatch, *stage("rl", base, records, tmp_path / "rl", *flags))
    assert any("answers otherwise behind padding" in line for line in logged)
    rows, seeds = [trainer.train_dataset[i] for i in (0, 1, 2, 3, 0)], list("abcde")

    def sampled(rows, seeds):
        return [answer["ids"] for answer in trainer.sample("policy", rows, seeds)]

    alone = [sampled([row], [seed])[0] for row, seed in zip(rows, seeds, strict=True)]
    assert sampled(rows, seeds) == alone
    trainer.pads = True
    assert sampled(rows, seeds) != alone, "this test needs a model that padding confuses"


def test_sampling_leaves_the_settings_that_are_saved_with_the_weights(tiny, records, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--use_peft", "False")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    trainer.sample("policy", [trainer.train_dataset[0]], ["a"])
    expected = AutoModelForCausalLM.from_pretrained(tiny("llama")).generation_config
    assert trainer.model.policy.generation_config.to_dict() == expected.to_dict()


def test_progress_of_sampling_and_scoring(tiny, records, tmp_path, monkeypatch):
    """Bars that reach their end, on one process only, and none under --disable_tqdm."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--max_target_length", 8)
    command = stage("rl", tiny("llama"), records, tmp_path / "rl", *flags, "--micro_batch_size", 1)
    for disabled, main, shown in ((False, True, True), (True, True, False), (False, False, False)):
        trainer, bars = make_trainer(monkeypatch, *command, "--disable_tqdm", disabled), []

        class Watched(tqdm):
            def __init__(self, *args, bars=bars, **kwargs):
                super().__init__(*args, **kwargs)
                bars.append((self, self.disable))

        monkeypatch.setattr(rl_training, "tqdm", Watched)
        monkeypatch.setattr(trainer, "is_world_process_zero", lambda main=main: main)
        trainer.answer_all("policy", [trainer.eval_dataset[i % 4] for i in range(12)])
        assert [disabled for _, disabled in bars] == [not shown] * 2
        if shown:  # two chunks of at most 8 prompts, 8 tokens each; and 12 answers
            assert [(bar.n, bar.total) for bar, _ in bars] == [(16, 16), (12, 12)]


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_every_role_computes_in_the_precision_asked_for(precision, dtype, tiny, records, tmp_path, monkeypatch):
    """Trainer's own autocast wraps forward(), which PPO does not call; log-probabilities are float32 all the same."""
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    flags = ("--reward_model_name_or_path", tmp_path / "rm", "--precision", precision, "--critic", "adapter")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    found = []
    layer = trainer.model.policy.get_base_model().model.layers[-1].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    with torch.no_grad():
        answers, rows = written_answers(trainer, ("Fever.", "Rest")), [trainer.train_dataset[i] for i in range(2)]
        chosen, batch = next(trainer.micro_batches(answers))
        logps = [trainer.model.token_logp(name, batch, 1.0)[0] for name in ("policy", "reference")]
        values = trainer.model.token_values(batch)
        trainer.model_scores(chosen, rows, *read(trainer, batch, chosen))
    assert found == [dtype] * 4
    assert all(tensor.dtype == torch.float32 for tensor in [*logps, values])


def test_modules_saved_in_full_are_float32_in_every_adapter(tiny, records, tmp_path, monkeypatch):
    """Also in the critic's, which comes after the policy's; what takes them to the base's dtype is there once."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--critic", "adapter", "--precision", "fp32")
    flags += ("--modules_to_save", "embed_tokens", "--dtype", "bfloat16")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "made", *flags))
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    embeddings = trainer.model.policy.get_base_model().get_input_embeddings()
    assert list(embeddings.modules_to_save) == ["default", VALUE]
    for module in embeddings.modules_to_save.values():
        assert (len(module._forward_pre_hooks), len(module._forward_hooks)) == (1, 1)
    in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *flags)).ok()
    for file in (ADAPTER, "value/model.safetensors"):
        assert {weight.dtype for weight in load_file(tmp_path / "rl" / file).values()} == {torch.float32}


def test_external_reward_model(tiny, records, tmp_path):
    """BERT with its own tokenizer and no chat template scores what the policy says, as text."""
    bert = save_tiny_bert(tmp_path / "bert")
    ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", "--reward_model_name_or_path", bert)).ok()
    assert "is a whole model: loaded beside the policy" in ended.stderr
    model = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    assert len(samples(tmp_path / "rl")) == 4
    for sample in samples(tmp_path / "rl"):
        pair = tokenizer(sample["prompt"][-1]["content"], sample["answer"], return_tensors="pt")
        assert model(**pair).logits.item() == pytest.approx(sample["score"], abs=1e-4)
    in_process(*merge(tiny("llama"), tmp_path / "rl", tmp_path / "rl-merged")).ok()


def moved_copy(model: str, folder: Path) -> Path:
    """The model with other weights."""
    shutil.copytree(model, folder)
    moved = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        moved.model.layers[0].self_attn.q_proj.weight += 0.01
    moved.save_pretrained(folder)
    return folder


@torch.no_grad()
def scored_alone(model, tokenizer, sample: dict) -> float:
    """A line of samples.jsonl as stage 3 reads it: the conversation, its answer without an end, no padding."""
    turns = [*sample["prompt"], {"role": "assistant", "content": sample["answer"]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n").removesuffix(tokenizer.eos_token)
    return model.eval()(**tokenizer(text, return_tensors="pt")).logits.item()


def samples(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["adapter", "whole model", "whole model without a pad token"])
def test_decoder_reward_model_beside_the_policy(kind, tiny, records, tmp_path):
    """Scores in padded batches are those one by one, though the base's config pads with eos, or nothing pads."""
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm", "--max_steps", 20)).ok()
    reward, tokenizer = tmp_path / "rm", AutoTokenizer.from_pretrained(tmp_path / "rm")
    config = AutoConfig.from_pretrained(tiny("llama"))
    assert config.pad_token_id == config.eos_token_id != tokenizer.pad_token_id, "this test needs two pad tokens"
    if kind == "adapter":
        base = AutoModelForSequenceClassification.from_pretrained(tiny("llama"), num_labels=1)
        model = PeftModel.from_pretrained(base, reward)
    else:
        in_process(*merge(tiny("llama"), reward, tmp_path / "merged")).ok()
        reward = tmp_path / "merged"
        model = AutoModelForSequenceClassification.from_pretrained(reward)
    if "without" in kind:
        for file, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
            settings = json.loads((reward / file).read_text())
            (reward / file).write_text(json.dumps(settings | {key: None}))
    policy = moved_copy(tiny("llama"), tmp_path / "policy")
    flags = ("--reward_model_name_or_path", reward, "--precision", "fp32", "--min_target_length", 8)
    ended = in_process(*stage("rl", policy, records, tmp_path / "rl", *flags)).ok()
    told = f"is an adapter on {tiny('llama')}, and not on {policy}" if kind == "adapter" else "is a whole model"
    level = "WARNING" if kind == "adapter" else "INFO   "
    assert f"{level} Reward model {reward} {told}: loaded beside the policy" in ended.stderr
    assert results(tmp_path / "rl")["eval_eos_rate"] == 0.0, "this test needs answers that do not end"
    alone = [scored_alone(model, tokenizer, sample) for sample in samples(tmp_path / "rl")]
    assert [sample["score"] for sample in samples(tmp_path / "rl")] == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 4) for score in alone}) > 1, "this test needs scores that differ"


def test_reward_adapter_of_weights_that_are_gone(tiny, records, tmp_path):
    """The SFT model was trained anew, in the same folder, after the reward model: said, and overridden by --force."""
    base = tmp_path / "sft"
    shutil.copytree(tiny("llama"), base)
    in_process(*stage("rm", base, records, tmp_path / "rm")).ok()
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.01
    model.save_pretrained(base)
    command = stage("rl", base, records, tmp_path / "rl", "--reward_model_name_or_path", tmp_path / "rm")
    ended = in_process(*command)
    assert ended.code == 2 and "is not the base of" in ended.stderr and not (tmp_path / "rl").exists()
    ended = in_process(*merge(base, tmp_path / "rm", tmp_path / "merged"))
    assert ended.code == 2 and "is not the base of" in ended.stderr and not (tmp_path / "merged").exists()
    assert "--force: taking" in in_process(*command, "--force").ok().stderr
    assert "--force: taking" in in_process(*merge(base, tmp_path / "rm", tmp_path / "merged"), "--force").ok().stderr


FUNCTIONS = """
def shorter(prompts, completions, completion_ids, **columns):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    return [-len(ids) for ids in completion_ids]


def spread(completion_ids, **columns):
    return [sum(ids) % 7 * 3 - 8 for ids in completion_ids]


def nothing(completions, **columns):
    return [None for _ in completions]


def one(completions, **columns):
    return [1.0]


def nan(completions, **columns):
    return [float("nan") for _ in completions]


def later_nan(completion_ids, trainer_state, **columns):
    return [float("nan") if trainer_state.global_step == 4 else -len(ids) for ids in completion_ids]
"""


def test_reward_functions(tiny, records, tmp_path):
    """A file's functions are the reward, without a reward model; what they get wrong is said in one message."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    functions = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter,nothing", "--reward_weights", "2,1")
    in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *functions)).ok()
    found = results(tmp_path / "rl")
    assert found["eval_reward"] == -2 * found["eval_length"] == 2 * found["eval_reward_shorter"]
    assert found["eval_reward_nothing"] == 0.0
    for name, message in (("one", "returned 1 numbers for"), ("missing", "has no function missing")):
        flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:{name}")
        ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / name, *flags))
        assert ended.code == 2 and message in ended.stderr


def test_what_a_function_does_to_its_lists_stays_there():
    def greedy(prompts, completion_ids, **columns):
        prompts[0].append("more")
        return [completion_ids[0].pop()]

    columns = {"prompts": [["one"]], "completions": ["a"], "completion_ids": [[7, 8]]}
    assert [function_scores("greedy", greedy, columns) for _ in range(2)] == [[8.0], [8.0]]
    assert columns == {"prompts": [["one"]], "completions": ["a"], "completion_ids": [[7, 8]]}


def test_a_function_that_fails_is_named_with_its_line(tmp_path):
    lines = ["def part(text):", "    return {}['boom']", "", "def whole(completions, **columns):"]
    (tmp_path / "rewards.py").write_text("\n".join([*lines, "    return [part(text) for text in completions]"]))
    (function,) = load_functions(f"{tmp_path / 'rewards.py'}:whole").values()
    with pytest.raises(UserError, match=r"^reward function whole \(.*rewards.py, line 2\) raised KeyError: 'boom'"):
        function_scores("whole", function, {"completions": ["a"]})


def test_a_function_may_be_in_a_module_with_dataclasses_and_neighbours(tmp_path):
    (tmp_path / "beside_it.py").write_text("FACTOR = 2\n")
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", "from beside_it import FACTOR"]
    lines += ["@dataclass", "class Wish:", "    factor: int = FACTOR", "def wished(completions, **columns):"]
    (tmp_path / "rewards.py").write_text("\n".join([*lines, "    return [Wish().factor for _ in completions]"]))
    (function,) = load_functions(f"{tmp_path / 'rewards.py'}:wished").values()
    assert function(completions=[1, 2]) == [2, 2]


def test_names_that_would_hide_a_figure_are_refused(tiny, records, tmp_path):
    (tmp_path / "rewards.py").write_text("def model(**columns): ...\ndef length(**columns): ...\n")
    file = tmp_path / "rewards.py"
    for given, named in (("model", "model"), ("length", "length")):
        with pytest.raises(UserError, match=f"--reward_functions names {named}: expected each once"):
            RewardSourceArguments("some/model", f"{file}:{given}")
    with pytest.raises(UserError, match="names length: expected each once"):
        RewardSourceArguments(None, f"{file}:length,length")
    assert RewardSourceArguments(None, f"{file}:length").weights() == {"length": 1.0}


@pytest.mark.parametrize("flags", [(), ("--fresh",)])
def test_the_reward_models_folder_is_not_written_into(flags, tiny, records, tmp_path):
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    (tmp_path / "rm" / "run.json").unlink()  # as somebody else's would have none
    before = {path: path.read_bytes() for path in sorted((tmp_path / "rm").rglob("*")) if path.is_file()}
    flags += ("--reward_model_name_or_path", tmp_path / "rm")
    ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rm", *flags))
    assert ended.code == 2 and "is the folder of the reward model" in ended.errors[0]
    assert {path: path.read_bytes() for path in sorted((tmp_path / "rm").rglob("*")) if path.is_file()} == before


RANKED = """
def ranked(prompts, completion_ids, **columns):
    print("asked", [prompt[-1]["content"] for prompt in prompts])
    mean = sum(map(len, completion_ids)) / len(completion_ids)
    return [mean - len(ids) for ids in completion_ids]
"""


def test_a_function_judges_a_rollout_as_a_whole(tiny, records, tmp_path):
    """In the prompts' order, however many answers are in memory at once."""
    (tmp_path / "rewards.py").write_text(RANKED)
    printed = []
    for size in (1, 4):
        flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:ranked", "--micro_batch_size", size)
        ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / f"{size}", *flags)).ok()
        printed.append([line for line in ended.stdout.splitlines() if line.startswith("asked")])
    assert printed[0] == printed[1] and printed[0]
    assert results(tmp_path / "1")["eval_reward"] == pytest.approx(results(tmp_path / "4")["eval_reward"], abs=1e-5)
    assert abs(results(tmp_path / "1")["eval_reward"]) < 1e-5, "deviations from the mean of all answers"


TRL_FUNCTIONS = """
import asyncio


def wanted_length(completion_ids, wanted, log_extra, log_metric, **columns):
    log_extra("wanted", wanted)
    log_metric("longest", max(map(len, completion_ids)))
    return [-abs(len(ids) - number) for ids, number in zip(completion_ids, wanted)]


async def waits(prompts, completions, completion_ids, **columns):
    await asyncio.sleep(0)
    return [0.25 * len(ids) for ids in completion_ids]


def extra_of_another_length(completions, log_extra, **columns):
    log_extra("notes", ["a", "b", "c", "d", "e"])
    return [0.0 for _ in completions]
"""


def test_a_logged_metric_weighs_by_its_answers():
    """A rank with an answer more than the others has that much more of the mean."""
    metrics = []
    for answers, value in ((4, 1.0), (3, 8.0)):
        recorders([{} for _ in range(answers)], metrics)["log_metric"]("found", value)
    assert means(metrics) == {"found": pytest.approx((4 * 1 + 3 * 8) / 7)}


def test_functions_written_for_trl(tiny, records, tmp_path):
    """Summed with the model by weight; they see the record's columns, may be async, and may log."""
    (tmp_path / "rewards.py").write_text(TRL_FUNCTIONS)
    rows = [{"prompt": q, "wanted": i} for i, (q, _, _) in enumerate(QUESTIONS)]
    write_lines(tmp_path / "prompts" / "rl", rows)
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    flags = ("--reward_model_name_or_path", tmp_path / "rm", "--reward_weights", "0.5,2,3")
    flags += ("--reward_functions", f"{tmp_path / 'rewards.py'}:wanted_length,waits", "--max_steps", 2)
    in_process(*stage("rl", tiny("llama"), tmp_path / "prompts", tmp_path / "rl", *flags)).ok()
    found = results(tmp_path / "rl")
    parts = [found[f"eval_reward_{name}"] for name in ("model", "wanted_length", "waits")]
    assert found["eval_reward"] == pytest.approx(0.5 * parts[0] + 2 * parts[1] + 3 * parts[2])
    assert parts[2] == pytest.approx(found["eval_length"] / 4) and parts[0] != 0
    assert found["eval_longest"] == 8 and history(tmp_path / "rl", "longest") == [8, 8]
    asked = {row["prompt"]: row["wanted"] for row in rows}
    for sample in samples(tmp_path / "rl"):
        assert sample["wanted"] == asked[sample["prompt"][-1]["content"]]
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:extra_of_another_length")
    ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / "wrong", *flags))
    assert ended.code == 2 and "log_extra('notes') got 5 values for 4 completions" in ended.stderr


def test_samples_and_win_rate(tiny, records, tmp_path):
    """Each evaluation's answers are in the log, in TensorBoard and in samples.jsonl; the share of wins is theirs."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = (
        "--reward_functions",
        f"{tmp_path / 'rewards.py'}:spread",
        "--max_steps",
        2,
        "--eval_on_start",
        "--seed",
        5,
    )
    ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *flags)).ok()
    lines = (tmp_path / "rl" / "scores.jsonl").read_text().splitlines()
    before, after = (json.loads(line)["scores"] for line in lines)
    wins = [(new > old) + 0.5 * (new == old) for new, old in zip(after, before, strict=True)]
    assert results(tmp_path / "rl")["eval_win_rate_before"] == 0.5
    assert results(tmp_path / "rl")["eval_win_rate"] == statistics.fmean(wins) != 0.5
    shown = samples(tmp_path / "rl")
    assert [sample["reference_score"] for sample in shown] == before * 2 and len(shown) == 8
    for sample in shown:
        assert f"{sample['prompt'][-1]['content']!r} -> {sample['answer']!r}" in ended.stderr
    texts = {}
    for file in (tmp_path / "rl" / "runs").rglob("events*"):
        events = EventAccumulator(str(file), {"tensors": 0}).Reload()
        for tag in (tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")):
            for event in events.Tensors(tag):
                text = event.tensor_proto.string_val[0].decode()
                texts[event.step, int(tag.split("/")[1])] = text
    for i, sample in enumerate(shown):
        text = texts[sample["step"], i % 4]
        assert sample["prompt"][-1]["content"] in text and sample["answer"] in text


def test_best_policy_at_the_end(tiny, records, tmp_path):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:spread", "--max_steps", 4, "--save_steps", 1)
    flags += ("--eval_strategy", "steps", "--eval_steps", 1, "--load_best_model_at_end", "--max_eval_samples", 8)
    output = tmp_path / "rl"
    ended = in_process(*stage("rl", tiny("llama"), records, output, *flags)).ok()
    rewards = history(output, "eval_reward")
    best = max(range(4), key=lambda i: rewards[i])
    assert best < 3, f"this test needs a best that is not the last: {rewards}"
    assert f"checkpoint-{2 * (best + 1)}, best by" in ended.stderr
    assert same(lora(output), lora(output / f"checkpoint-{2 * (best + 1)}"))
    assert not same(lora(output), lora(output / "checkpoint-8"))
    assert results(output)["eval_reward"] == rewards[best]

    def scores():
        found = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
        return {row["step"]: statistics.fmean(row["scores"]) for row in found}, len(found)

    of_each = {2: rewards[0], 4: rewards[1], 6: rewards[2], 8: rewards[best]}  # the last of what was kept
    assert scores() == (pytest.approx(of_each), 4)
    shutil.rmtree(output / "checkpoint-8")  # as if killed after the evaluation behind it
    in_process(*stage("rl", tiny("llama"), records, output, *flags)).ok()
    assert scores() == (pytest.approx(of_each), 4) and len(samples(output)) == 4 * 4


def test_gradient_that_is_not_finite(tiny, records, tmp_path, monkeypatch):
    """In the second rollout: the policy that sampled it is put back, and the run ends."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:spread", "--max_steps", 4, "--report_to", "none")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    (tmp_path / "rl").mkdir(exist_ok=True)
    update, sampled = trainer.update, []

    def broken(answers):
        weights = sum(trainer.model.trained(), [])
        if trainer.state.global_step == 2:
            sampled.extend(weight.detach().clone() for weight in weights)
        loss = update(answers)
        if trainer.state.global_step == 3:
            weights[0].grad.view(-1)[0] = torch.inf
        return loss

    monkeypatch.setattr(trainer, "update", broken)
    transformers.Trainer.train(trainer)
    assert trainer.state.global_step == 4 and trainer.control.should_training_stop
    kept = sum(trainer.model.trained(), [])
    assert all(torch.equal(one, other) for one, other in zip(kept, sampled, strict=True))
    assert any(weight.abs().max() > 0 for weight in kept)
    (line,) = [json.loads(line) for line in (tmp_path / "rl" / "guards.jsonl").read_text().splitlines()]
    assert (line["guard"], line["reason"], line["step"]) == ("not_finite", "a gradient is not finite", 3)


def test_logged_kl_is_not_the_one_that_steers(tiny, records, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:spread", "--kl_estimator", "k2", "--adap_kl_ctrl")
    flags += ("--kl_target", 3, "--kl_horizon", 40, "--report_to", "none")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    moved(trainer)
    trainer.collect([trainer.train_dataset[i] for i in range(4)], 0)
    ratios = [answer["logp"] - answer["ref_logp"] for answer in trainer.rollout]
    k1, k2 = (statistics.fmean(f(r).sum().item() for r in ratios) for f in (lambda r: r, lambda r: r**2 / 2))
    assert k1 != pytest.approx(k2, rel=0.05)
    assert trainer.history[-1]["kl"] == pytest.approx(k1)
    (logged,) = [row["kl"] for row in trainer.stats if "kl" in row]
    assert logged == pytest.approx(k2)
    assert trainer.kl_coef == pytest.approx(0.05 * (1 + max(-0.2, min(0.2, k1 / 3 - 1)) * 4 / 40))
    rows = list(trainer.eval_dataset)
    ratios = [answer["logp"] - answer["ref_logp"] for answer in trainer.answer_all("policy", rows)]
    k2 = statistics.fmean((ratio**2 / 2).sum().item() for ratio in ratios)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(k2)


def test_every_log_probability_is_at_the_temperature_of_sampling(tiny, records, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:spread", "--temperature", 0.5, "--precision", "fp32")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    trainer.collect([trainer.train_dataset[i] for i in range(4)], 0)
    for answer in trainer.rollout:
        ids, start = answer["prompt"] + answer["ids"], len(answer["prompt"])
        with torch.no_grad():
            logits = trainer.model.policy(torch.tensor([ids])).logits[0, start - 1 : -1] / 0.5
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        for name in ("logp", "ref_logp"):
            torch.testing.assert_close(answer[name], expected, atol=1e-4, rtol=0)
    trainer.update(trainer.rollout)
    assert trainer.stats[-1]["step_kl"] == pytest.approx(0, abs=1e-5)


def test_an_answer_ends_at_the_first_of_several_ends(tiny, records, tmp_path, monkeypatch):
    """A turn of llama 3 ends with another token than its tokenizer's eos."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama3"), records, tmp_path / "rl", *flags))
    eos, turn = trainer.processing_class.convert_tokens_to_ids(["<|end|>", "<|eot_id|>"])
    assert trainer.eos_ids == sorted([eos, turn]) and eos != turn
    assert trainer.decoding().eos_token_id == trainer.eos_ids
    for ids, kept in (([9, turn, 9, eos], 2), ([9, 9, eos, turn], 3), ([9, 9, 9, 9], 4), ([turn], 1)):
        assert until_eos(ids, trainer.eos_ids) == ids[:kept]


def test_guard_stops_with_the_last_good_policy(tiny, records, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:nan", "--max_steps", 3)
    ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *flags)).ok()
    assert "Guard not_finite" in ended.stderr and "last good policy kept" in ended.stderr
    fired = [json.loads(line) for line in (tmp_path / "rl" / "guards.jsonl").read_text().splitlines()]
    assert [(line["guard"], line["stopped"], line["step"]) for line in fired] == [("not_finite", True, 0)]
    weights = load_file(tmp_path / "rl" / ADAPTER)
    assert all(torch.equal(w, torch.zeros_like(w)) for name, w in weights.items() if "lora_B" in name)

    assert "a reward or log-probability is not finite: {'reward': nan" in ended.stderr
    for guards in ("warn", "off"):
        ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / guards, *flags, "--guards", guards))
        assert ended.code == 1 and "not finite: {'reward': nan" in ended.errors[0], "there is nothing to learn from"
        assert "nothing of rollout 1 was learned" in ended.errors[0] and not (tmp_path / guards / ADAPTER).exists()

    monkeypatch.setattr("arguments.answers.mean_kl", lambda answers, _: mean_kl(answers, "k3"))  # never below 0
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--max_steps", 3, "--guard_kl", 1e-9)
    ended = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl2", *flags)).ok()
    assert "Guard kl" in ended.stderr  # the second rollout's: the policy that sampled the first is kept
    weights = load_file(tmp_path / "rl2" / ADAPTER)
    assert all(torch.equal(w, torch.zeros_like(w)) for name, w in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_that_a_guard_stopped_ends_with_its_policy_again(epochs, tiny, records, tmp_path):
    """A reward that turns bad in a later rollout: what is kept is the policy that sampled the last good one.

    With one step a rollout the run stops behind a step to save at: that checkpoint would be gone on from.
    """
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:later_nan", "--ppo_epochs", epochs)
    flags += ("--save_steps", 1, "--save_total_limit", 9, "--max_steps", 8)
    in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl3", *flags)).ok()
    kept, sampled_second = (
        load_file(tmp_path / "rl3" / ADAPTER),
        load_file(tmp_path / "rl3" / f"checkpoint-{4 - epochs}" / ADAPTER),
    )
    assert {path.name for path in (tmp_path / "rl3").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in range(epochs, 5, epochs)
    }
    assert all(torch.equal(kept[name], sampled_second[name]) for name in kept)
    assert any(w.abs().max() > 0 for name, w in kept.items() if "lora_B" in name)
    loss = results(tmp_path / "rl3")["train_loss"]
    # the same command again, as after a kill: the newest checkpoint holds the policy that set off the alarm
    in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl3", *flags)).ok()
    assert results(tmp_path / "rl3")["train_loss"] == loss != 0.0
    again = load_file(tmp_path / "rl3" / ADAPTER)
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    assert len((tmp_path / "rl3" / "guards.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "rl3" / "good.safetensors").exists()  # of checkpoints alone


# --- what each flag does

SETTINGS = {
    **{"reward_baseline": 0.0, "reward_clip": 10.0, "missing_eos_penalty": 1.0, "init_kl_coef": 0.05, "gamma": 1.0},
    **{"gae_lambda": 0.95, "whiten_advantages": True, "temperature": 1.0, "use_score_scaling": False},
}


def advantages_by_hand(answers: list[dict], settings: dict) -> list[float]:
    """Of all tokens of the answers, from what sampling and scoring found; arithmetic on plain numbers."""
    found, scale, center = [], 1.0, 0.0
    if settings["use_score_scaling"]:
        scale = statistics.pstdev(answer["score"] for answer in answers)
        center = (statistics.fmean(answer["score"] for answer in answers) - settings["reward_baseline"]) / scale
    for answer in answers:
        score = (answer["score"] - settings["reward_baseline"]) / scale
        score = max(center - settings["reward_clip"], min(center + settings["reward_clip"], score))
        score -= 0 if answer["finished"] else settings["missing_eos_penalty"]
        logp, ref_logp, values = (answer[name].tolist() for name in ("logp", "ref_logp", "values"))
        following, next_value, own = 0.0, 0.0, []
        for t in reversed(range(len(logp))):
            reward = -settings["init_kl_coef"] * (logp[t] - ref_logp[t]) + (score if t == len(logp) - 1 else 0)
            delta = reward + settings["gamma"] * next_value - values[t]
            following = delta + settings["gamma"] * settings["gae_lambda"] * following
            own, next_value = [following, *own], values[t]
        found += own
    if settings["whiten_advantages"]:
        mean, deviation = statistics.fmean(found), statistics.stdev(found)
        found = [(advantage - mean) / deviation for advantage in found]
    return found


def test_a_guard_stops_with_the_good_policy_also_where_the_best_is_asked_for(tiny, records, tmp_path, monkeypatch):
    flags = ("--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1)
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags += ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--guard_kl", 1e-6, "--learning_rate", 1e-2)
    in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *flags, "--max_steps", 4)).ok()
    assert results(tmp_path / "rl")["eval_kl"] == 0.0, "no policy that has moved is kept"


def test_a_clip_that_makes_scores_alike_is_told(tiny, records, tmp_path, monkeypatch, logged):
    far = "def far(completions, **kwargs):\n    return [50.0 + i for i in range(len(completions))]"
    (tmp_path / "rewards.py").write_text(far)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:far")
    for more, told in (((), True), (("--reward_baseline", 50), False)):
        trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags, *more))
        logged.clear()
        trainer.collect([trainer.train_dataset[i] for i in range(4)], 0)
        assert any("100% of the scores lie outside of -10 to 10 (--reward_clip)" in line for line in logged) == told


def moved(trainer) -> None:
    """Give all that is trained other weights, as if after some steps."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in sum(trainer.model.trained(), []):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"reward_baseline": 3.0},
        {"reward_clip": 4.0},
        {"missing_eos_penalty": 7.0},
        {"init_kl_coef": 2.0},
        {"gamma": 0.5},
        {"gae_lambda": 0.3},
        {"whiten_advantages": False},
        {"temperature": 0.5},
        {"use_score_scaling": True},
        {"use_score_scaling": True, "reward_baseline": -1e3},
    ],
    ids=lambda changed: " ".join(changed) or "defaults",
)
def test_advantages_of_a_rollout(changed, tiny, records, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:spread", "--precision", "fp32")
    flags += tuple(word for name, value in changed.items() for word in (f"--{name}", value))
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    moved(trainer)
    trainer.collect([trainer.train_dataset[i] for i in range(4)], 0)
    answers, settings = trainer.rollout, SETTINGS | changed
    found = torch.cat([answer["advantages"] for answer in answers]).tolist()
    assert found == pytest.approx(advantages_by_hand(answers, settings), rel=1e-3, abs=1e-4)
    if changed:  # the flag makes a difference to this rollout
        other = {name: SETTINGS[name] for name in changed}
        assert "temperature" in changed or found != pytest.approx(
            advantages_by_hand(answers, settings | other), rel=1e-3, abs=1e-4
        )
    policy = trainer.model.policy.eval()
    for answer in answers:
        ids, before = torch.tensor([answer["prompt"] + answer["ids"]]), len(answer["prompt"]) - 1
        with torch.no_grad():
            logp = (policy(input_ids=ids).logits[0, before:-1] / settings["temperature"]).log_softmax(-1)
        expected = logp.gather(1, ids[0, before + 1 :, None])[:, 0]
        torch.testing.assert_close(answer["logp"], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(answer["entropy"], -(logp.exp() * logp).sum(-1), atol=1e-4, rtol=1e-4)


def test_a_scale_is_measured_once(tiny, records, tmp_path, monkeypatch):
    """The first rollout's spread divides the scores of all; where it has none, the next one's that has."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = (
        "--reward_functions",
        f"{tmp_path / 'rewards.py'}:spread",
        "--use_score_scaling",
        "--reward_baseline",
        0.3,
    )
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    rows, scales = [trainer.train_dataset[i % 4] for i in range(12)], []
    assert torch.full((12,), -0.3).std() > 0  # by rounding alone
    for number, factor in enumerate((0.0, 1.0, 100.0)):
        trainer.reward_weights = {"spread": factor}
        trainer.collect(rows, number)
        scales.append((trainer.score_scale, statistics.pstdev(answer["score"] for answer in trainer.rollout)))
    assert scales[0][0] == 0.0 < scales[1][0] == pytest.approx(scales[1][1]) == scales[2][0] < scales[2][1]


def test_least_and_most_tokens(tiny, records, tmp_path, monkeypatch):
    """Half of all tokens end an answer here: none does so before --min_target_length others."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    functions = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter")
    for least in (1, 5):
        flags = (*functions, "--min_target_length", least)
        trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
        trainer.eos_ids = list(range(0, 400, 2))
        rows = [trainer.train_dataset[i % 4] for i in range(16)]
        lengths = [len(answer["ids"]) for answer in trainer.sample("policy", rows, [str(i) for i in range(16)])]
        assert min(lengths) == least + 1 and max(lengths) <= 8


def lora(output: Path) -> dict:
    return load_file(output / ADAPTER)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_early_stopping(tiny, records, tmp_path):
    """The policy rests for the rest of a rollout once it has moved by 1.5 times --target_kl; the critic goes on."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)

    def run(name, epochs, *flags):
        common = ("--reward_functions", f"{tmp_path / 'rewards.py'}:spread", "--lr_scheduler_type", "constant")
        flags = (*common, "--ppo_epochs", epochs, "--precision", "fp32", "--seed", 1, *flags)
        in_process(*stage("rl", tiny("llama"), records, tmp_path / name, *flags)).ok()
        return tmp_path / name

    two, four = run("two", 2), run("four", 4)
    moved = 2 * history(two, "step_kl")[0]  # the mean of both epochs; 0 in the first
    assert moved > 0 and not same(lora(two), lora(four))
    stopped = run("stopped", 4, "--early_stopping", "--target_kl", moved / 1.6)
    assert history(stopped, "step_kl") == history(two, "step_kl")  # of the epochs in which the policy learned
    assert same(lora(stopped), lora(two))
    assert history(stopped, "policy_stopped") == [0.5], "the share of the updates"
    heads = [load_file(output / "value" / "head.safetensors") for output in (two, four, stopped)]
    assert same(heads[2], heads[1]) and not same(heads[2], heads[0])
    assert not same(lora(run("late", 4, "--early_stopping", "--target_kl", moved / 1.4)), lora(two))
    assert same(lora(run("unasked", 4, "--target_kl", moved / 1.6)), lora(four))


def test_critic_warmup(tiny, records, tmp_path):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    for rollouts, changed in ((1, False), (2, True)):
        flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:spread", "--critic_warmup", 1)
        in_process(
            *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags, "--max_steps", rollouts, "--fresh")
        ).ok()
        assert any(w.abs().max() > 0 for name, w in lora(tmp_path / "rl").items() if "lora_B" in name) == changed
        assert load_file(tmp_path / "rl" / "value" / "head.safetensors")["weight"].abs().max() > 0


# --- learning

RULES = """
def even(completion_ids, **columns):
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]
"""


def peaked(model: str, folder: Path) -> Path:
    """A copy whose logits can grow large: below a random head no LoRA lifts some tokens far above the others."""
    shutil.copytree(model, folder)
    changed = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        changed.lm_head.weight *= 20
    changed.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("critic", "weight"), [("head", 1), ("adapter", 1), ("head", -1)])
def test_a_rule_with_a_known_answer_is_learned(critic, weight, tiny, records, tmp_path):
    """The share of even tokens in an answer: half at first, at most 1. With the sign turned it goes the other way."""
    (tmp_path / "rewards.py").write_text(RULES)
    base = peaked(tiny("llama"), tmp_path / "base")
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:even", "--reward_weights", weight, "--critic", critic)
    flags += ("--batch_size", 64, "--mini_batch_size", 16, "--micro_batch_size", 64, "--max_train_samples", 8)
    flags += (
        "--missing_eos_penalty",
        0,
        "--init_kl_coef",
        0,
        "--guards",
        "off",
        "--max_steps",
        16,
        "--max_target_length",
        4,
    )
    flags += ("--learning_rate", 2e-2, "--max_eval_samples", 8, "--eval_on_start", "--precision", "fp32")
    in_process(*stage("rl", base, records, tmp_path / "rl", *flags)).ok()
    before, after = (weight * results(tmp_path / "rl")[name] for name in ("eval_reward_before", "eval_reward"))
    assert 0.3 < before < 0.7
    assert after >= 0.9 if weight > 0 else after <= 0.2


# --- what must not change a run

WEIGHTS = (ADAPTER, "value/model.safetensors", "value/head.safetensors")


def largest_difference(first: Path, second: Path) -> float:
    """Of all trained weights of two runs; they must be of the same names."""
    found, files = 0.0, [name for name in WEIGHTS if (first / name).exists()]
    assert files == [name for name in WEIGHTS if (second / name).exists()] and ADAPTER in files
    for file in files:
        one, other = load_file(first / file), load_file(second / file)
        assert one.keys() == other.keys()
        found = max(found, *((one[key] - other[key]).abs().max().item() for key in one))
    return found


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_what_does_not_change_a_run(critic, tiny, records, tmp_path):
    """How often it evaluates: not at all. How it cuts a mini-batch, checkpoints activations: rounding."""
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    same = (
        "--reward_model_name_or_path",
        tmp_path / "rm",
        "--max_steps",
        3,
        "--precision",
        "fp32",
        "--critic",
        critic,
    )

    def run(name, *flags):
        in_process(*stage("rl", tiny("llama"), records, tmp_path / name, *same, *flags)).ok()
        return tmp_path / name

    plain = run("plain")
    steps = json.loads((plain / "trainer_state.json").read_text())["global_step"]
    assert steps == 3 * 2 * 1  # rollouts x epochs x mini-batches
    assert max(w.abs().max().item() for k, w in load_file(plain / ADAPTER).items() if "lora_B" in k) > 1e-3
    often = run("often", "--eval_strategy", "steps", "--eval_steps", 1, "--eval_on_start")
    assert len(history(often, "eval_reward")) == 1 + 3 + 1 and largest_difference(plain, often) == 0.0
    assert largest_difference(plain, run("micro", "--micro_batch_size", 1)) < 1e-5
    assert largest_difference(plain, run("checkpointing", "--gradient_checkpointing")) < 1e-5
    assert largest_difference(plain, run("other", "--seed", 7)) > 1e-3, "any two runs would pass"


def test_critic_that_is_a_head_alone(tiny, records, tmp_path, monkeypatch):
    """It reads the frozen role's states, once a rollout: with what the reward adapter, or the reference, computes."""
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    bert = save_tiny_bert(tmp_path / "bert")
    for name, reward, flags in (
        ("shared", tmp_path / "rm", ()),
        ("external", bert, ()),
        ("full", bert, ("--use_peft", "False")),
    ):
        flags = ("--reward_model_name_or_path", reward, "--critic", "head", "--max_steps", 2, *flags)
        in_process(*stage("rl", tiny("llama"), records, tmp_path / name, *flags)).ok()
        assert sorted(path.name for path in (tmp_path / name / "value").iterdir()) == [
            "head.safetensors",
            "state.json",
        ]
        assert load_file(tmp_path / name / "value" / "head.safetensors")["weight"].abs().max() > 1e-3
        assert len(history(tmp_path / name, "explained_variance")) == 2
    flags = ("--reward_model_name_or_path", tmp_path / "rm", "--critic", "head", "--precision", "fp32")
    trainer = make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    torch.nn.init.ones_(trainer.model.value_head.weight)
    rows = [trainer.train_dataset[i] for i in range(4)]
    answers = written_answers(trainer, ("a", "bc", "d", "e"))
    answers = [answer | {"row": i, "finished": True} for i, answer in enumerate(answers)]
    for answer in trainer.judge(answers, rows, critic=True):
        with torch.no_grad(), trainer.model.role("reward") as model:
            ids = torch.tensor([answer["prompt"] + answer["ids"]])
            states = model.base_model(input_ids=ids).last_hidden_state[0]
        before = len(answer["prompt"]) - 1
        torch.testing.assert_close(answer["values"], states[before:-1].sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["bloom", "gpt2", "gemma3"])
def test_all_weights_of_a_tied_model_go_on(family, tiny, records, tmp_path):
    """One weight with two names, in policy and critic: saved once, and a resumed run ends as one left alone."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    assert AutoConfig.from_pretrained(tiny(family)).tie_word_embeddings
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--use_peft", "False", "--critic", "adapter")
    flags += ("--max_steps", 2, "--save_steps", 1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    in_process(*stage("rl", tiny(family), records, whole, *flags)).ok()
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    assert "Going on from" in in_process(*stage("rl", tiny(family), records, cut, *flags)).ok().stderr
    for file in ("model.safetensors", "value/model.safetensors", "value/head.safetensors"):
        one, other, halfway = (load_file(folder / file) for folder in (whole, cut, whole / "checkpoint-2"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert any(not torch.equal(one[key], halfway[key]) for key in one), "nothing happened after the checkpoint"
    assert results(whole)["eval_reward"] == results(cut)["eval_reward"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_are_finer_than_the_base(dtype, tiny, records, tmp_path, monkeypatch):
    """A head in bfloat16, tied to the embeddings or not, is widened by itself."""
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--dtype", dtype)
    model = make_trainer(monkeypatch, *stage("rl", tiny("qwen3"), records, tmp_path / "rl", *flags)).model.policy
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    hidden = torch.randn(2, 3, model.config.hidden_size, dtype=torch.bfloat16)
    assert model.get_output_embeddings()(hidden).dtype == torch.float32


def test_a_gpu_holds_all_roles(tiny, records, tmp_path, monkeypatch, logged):
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    flags = ("--reward_functions", f"{tmp_path / 'rewards.py'}:shorter", "--device_map", "auto")
    make_trainer(monkeypatch, *stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    assert any("--device_map auto has no effect in RL" in line for line in logged)


def test_a_reward_model_of_its_own_reads_whole_answers(tiny):
    """The limit of an answer is in the policy's tokens; here a character is a token."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny("llama"), num_labels=1)
    tokenizer = ModelArguments(tiny("llama")).load_tokenizer()
    model.config.pad_token_id = tokenizer.pad_token_id
    judge = RewardModel(model, tokenizer, DataArguments("unused", max_source_length=64, max_target_length=4))
    question, answer = "What helps?", "Rest, cold and a bandage, for two days. "
    asked = [{"role": "user", "content": question}]
    with torch.no_grad():
        told = [[*asked, {"role": "assistant", "content": answer * n}] for n in (1, 2)]
        short, long = (judge([conversation]).item() for conversation in told)
        cut_off = judge(told, [True, False]).tolist()
    assert short != long
    assert cut_off[0] == pytest.approx(short, abs=1e-6) and cut_off[1] != pytest.approx(long, abs=1e-6)


def test_a_reward_model_without_embeddings_for_its_tokens(tiny):
    """The tokenizer got a token and the model was not resized: said, with the token, not as an index out of range."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny("llama"), num_labels=1)
    tokenizer = ModelArguments(tiny("llama")).load_tokenizer()
    tokenizer.add_tokens([f"<new{number}>" for number in range(1 + model.config.vocab_size - len(tokenizer))])
    judge = RewardModel(model, tokenizer, LengthArguments())
    last = f"<new{model.config.vocab_size - len(AutoTokenizer.from_pretrained(tiny('llama')))}>"
    with pytest.raises(
        UserError,
        match=f"the reward model: the token '{last}' has the id {model.config.vocab_size}, but the model has",
    ):
        judge([[{"role": "user", "content": "a"}, {"role": "assistant", "content": last}]])


@pytest.mark.parametrize("first", ["config", "tokenizer"])
def test_model_and_tokenizer_pad_with_the_token_that_training_padded_with(first, tiny):
    """An adapter's tokenizer knows it, its base's config does not: the score would be read at another token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    known = {"config": 5, "tokenizer": tokenizer.pad_token_id}
    assert tokenizer.pad_token_id not in (None, 5), "this test needs two tokens"
    config = SimpleNamespace(pad_token_id=known["config"], vocab_size=len(tokenizer))
    pad_alike(config, tokenizer, first)
    assert config.pad_token_id == tokenizer.pad_token_id == known[first]


def test_a_reward_model_of_few_positions_reads_less_of_a_question(tiny, capsys):
    logger.add(lambda line: print(line))
    model = AutoModelForSequenceClassification.from_pretrained(tiny("gpt2"), num_labels=1)  # 1,024
    tokenizer = ModelArguments(tiny("gpt2")).load_tokenizer()
    model.config.pad_token_id = tokenizer.pad_token_id
    judge = RewardModel(model, tokenizer, LengthArguments(max_source_length=1000, max_target_length=100))
    assert (judge.lengths.max_source_length, judge.lengths.max_target_length) == (924, 100)
    assert "The reward model has 1024 positions: it reads 924 tokens of a question" in capsys.readouterr().out
    turns = [{"role": "user", "content": "heart " * 1500}, {"role": "assistant", "content": "blood " * 300}]
    assert judge([turns]).isfinite().all()
    bloom = AutoModelForSequenceClassification.from_pretrained(tiny("bloom"), num_labels=1)  # knows no limit
    tokenizer = ModelArguments(tiny("bloom")).load_tokenizer()
    assert RewardModel(bloom, tokenizer, LengthArguments(max_source_length=9999)).lengths.max_source_length == 9999
    with pytest.raises(UserError, match="too few for an answer of 1024 tokens"):
        RewardModel(model, tokenizer, LengthArguments(max_target_length=1024))


# --- quantised bases


@pytest.fixture
def wide(tmp_path, monkeypatch) -> str:
    """A llama whose rows fill a block of 64 4-bit weights: bitsandbytes' CPU code fails with narrower ones."""
    config, size, words = tiny_models.FAMILIES["llama"]
    size = size | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    monkeypatch.setitem(tiny_models.FAMILIES, "llama", (config, size, words))
    return tiny_models.save_tiny("llama", tmp_path / "wide")


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit"])
def test_quantised_classifier_keeps_its_head(flag, wide, records, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantised model can be tried")
    bert = tiny_models.save_tiny_bert(tmp_path / "bert")
    config = AutoConfig.from_pretrained(bert, hidden_size=64, intermediate_size=128)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(bert)
    flags = (flag, "--reward_model_name_or_path", bert)
    trainer = make_trainer(monkeypatch, *stage("rl", wide, records, tmp_path / "rl", *flags))
    model = trainer.reward_model.model
    assert model.classifier.weight.dtype == torch.float32
    assert not model.bert.encoder.layer[0].output.dense.weight.is_floating_point()
    trainer.collect([trainer.train_dataset[i] for i in range(4)], 0)
    assert len({answer["score"] for answer in trainer.rollout}) == 4


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit"])
def test_quantised_base(flag, wide, records, tmp_path, monkeypatch):
    """Reward model, policy and merges on a base in 4 or 8 bits; a reward model beside the policy is in as many."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: no quantised base can be tried")
    in_process(*stage("rm", wide, records, tmp_path / "rm", flag)).ok()
    assert {weight.dtype for weight in load_file(tmp_path / "rm" / ADAPTER).values()} == {torch.float32}
    flags = ("--reward_model_name_or_path", tmp_path / "rm", flag, "--ppo_epochs", 1, "--eval_on_start")
    ended = in_process(*stage("rl", wide, records, tmp_path / "rl", *flags)).ok()
    assert "an adapter on the policy's base" in ended.stderr
    assert history(tmp_path / "rl", "kl")[0] == 0.0
    rounding = 0.0 if flag == "--load_in_4bit" else 1e-3  # 8 bits: other products where a gradient is wanted
    assert abs(history(tmp_path / "rl", "step_kl")[0]) <= rounding
    in_process(*merge(wide, tmp_path / "rl", tmp_path / "rl-merged")).ok()
    in_process(*merge(wide, tmp_path / "rm", tmp_path / "rm-merged")).ok()

    flags = ("--reward_model_name_or_path", tmp_path / "rm-merged", flag, "--precision", "fp32")
    trainer = make_trainer(monkeypatch, *stage("rl", wide, records, tmp_path / "beside", *flags))
    weights = trainer.reward_model.model.model.layers[0].mlp.up_proj.weight
    assert weights.dtype == {"--load_in_4bit": torch.uint8, "--load_in_8bit": torch.int8}[flag]
    assert trainer.reward_model.model.score.weight.dtype == torch.float32
    rows = [trainer.train_dataset[i] for i in range(4)]
    answers = written_answers(trainer, ("Fever.", "Rest", "At once", "No"))
    answers = [answer | {"row": i, "finished": True} for i, answer in enumerate(answers)]
    trainer.model.train()
    answers = trainer.judge(answers, rows, critic=True)
    answers = [answer | {"advantages": answer["logp"], "returns": answer["logp"]} for answer in answers]

    def gradients() -> dict:
        trainer.model.zero_grad()
        trainer.model.train()
        trainer.update(answers)
        return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

    first, _, then = gradients(), trainer.sample("policy", rows, list("abcd")), gradients()
    assert any("layers.0" in name and grad.abs().max() > 0 for name, grad in first.items())
    for name in first:  # sampling must not change what a backward pass reaches
        assert (first[name] - then[name]).abs().max() <= 0.02 * first[name].abs().max(), name


# --- kills

KILLED = """
import os, runpy, signal, sys
import transformers
import rl_training

place, when, sys.argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
owner = {"generate": rl_training.PPOTrainer, "update": rl_training.PPOTrainer}.get(place, transformers.Trainer)
function, calls = getattr(owner, place), []


def deadly(*args, **kwargs):
    calls.append(1)
    if len(calls) == when:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)


setattr(owner, place, deadly)
rl_training.run_stage(rl_training.main)
"""


@pytest.mark.parametrize(
    ("place", "call", "critic"),
    [
        pytest.param("generate", 3, "adapter", id="in a rollout"),
        pytest.param("update", 6, "head", id="between epochs"),
        pytest.param("_save_rng_state", 2, "adapter", id="in a save"),
    ],
)
def test_killed_run_goes_on(place, call, critic, tiny, records, tmp_path):
    """kill -9, then the same command again: the weights of a run left alone, bit for bit."""
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    flags = ("--reward_model_name_or_path", tmp_path / "rm", "--max_steps", 3, "--save_steps", 1, "--critic", critic)
    flags += ("--adap_kl_ctrl", "--kl_horizon", 8, "--mini_batch_size", 2, "--use_score_scaling")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    in_process(*stage("rl", tiny("llama"), records, whole, *flags)).ok()
    (tmp_path / "killed.py").write_text(KILLED)
    command = stage("rl", tiny("llama"), records, killed, *flags)
    ended = in_subprocess(tmp_path / "killed.py", place, call, *command, PYTHONPATH=str(ROOT))
    assert ended.code == -9 and not (killed / ADAPTER).exists()
    again = in_process(*command).ok()
    assert "Going on from" in again.stderr
    assert ("its saving was interrupted" in again.stderr) == (place == "_save_rng_state")
    assert largest_difference(whole, killed) == 0.0
    for name in ("reward", "kl_coef"):
        assert history(whole, name) == history(killed, name)
    assert len(set(history(whole, "kl_coef"))) == 3, "this test needs a price that moves"


def test_checkpoint_of_another_critic_or_batch_is_refused(tiny, records, tmp_path):
    in_process(*stage("rm", tiny("llama"), records, tmp_path / "rm")).ok()
    flags = ("--reward_model_name_or_path", tmp_path / "rm", "--max_steps", 2, "--save_steps", 1)
    command = stage("rl", tiny("llama"), records, tmp_path / "rl", *flags)
    in_process(*command).ok()
    ended = in_process(*command, "--critic", "adapter")
    assert ended.code == 2 and "was trained with another --critic" in ended.stderr
    ended = in_process(*command, "--batch_size", 8, "--mini_batch_size", 2)
    assert ended.code == 2 and "was trained with 2 optimizer steps a rollout" in ended.errors[0]
