"""Packed rows train as separate ones do, in every family; models that cannot keep them apart are found out."""

import re
import shutil

import pytest
import torch
from conftest import ADAPTER, alone, history, in_process, results, stage, write_lines
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import FAMILIES
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from arguments.command_line import UserError
from arguments.data import DataArguments
from arguments.model import alike, keeps_apart
from pretraining import PretrainingArguments, build_blocks
from pretraining import pack as pack_documents
from supervised_finetuning import FinetuningTrainer, collate, pack

KEEP_APART = sorted(set(FAMILIES) - {"bloom"})  # ALiBi knows no position_ids


def conversations():
    """Eight of 9 to 30 tokens, the first four of each untrained."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (9 + 3 * i,), generator=generator).tolist() for i in range(8)]
    return Dataset.from_list([{"input_ids": ids, "labels": [-100] * 4 + ids[4:]} for ids in rows])


def loss_and_gradients(model, rows):
    """Of all trained tokens together, through the trainer's own loss."""
    trainer = alone(FinetuningTrainer.__new__(FinetuningTrainer))
    model.zero_grad()
    batch = collate(list(rows), pad_token_id=0)
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    loss = trainer.compute_loss(model, batch, num_items_in_batch=count)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", KEEP_APART)
def test_packed_loss_and_gradients_equal_separate_ones(tiny, family):
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).train(False)
    rows = conversations()
    packed = pack(rows, 64)
    assert len(packed) < len(rows) and sum(packed["length"]) == sum(map(len, rows["input_ids"]))
    loss, gradients = loss_and_gradients(model, rows)
    packed_loss, packed_gradients = loss_and_gradients(model, packed)
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_model_is_asked_whether_it_keeps_sequences_apart(tiny, family):
    model = AutoModelForCausalLM.from_pretrained(tiny(family))
    assert keeps_apart(model) == (family in KEEP_APART)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_keeps_sequences_apart(dtype):
    """But for rounding: an expert computes the tokens of both sequences in one product."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **size)
    assert keeps_apart(AutoModelForCausalLM.from_config(config).to(dtype))


def test_large_float16_numbers_are_told_apart():
    large = torch.full((6, 50_000), 200.0, dtype=torch.float16)
    assert alike(large, large.clone()) and not alike(large, -large)


def test_a_model_that_zero3_has_split_cannot_be_asked(tiny, monkeypatch):
    monkeypatch.setattr("arguments.model.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="ZeRO-3 has split it: take scripts/zero2.json"):
        keeps_apart(AutoModelForCausalLM.from_pretrained(tiny("llama")))


def test_bloom_is_not_packed_but_batched_by_length(tiny, records, tmp_path):
    packed = in_process(*stage("sft", tiny("bloom"), records, tmp_path / "packed", "--packing")).ok()
    assert "bloom does not use position_ids: batches of like length, not packing" in packed.stderr
    in_process(*stage("sft", tiny("bloom"), records, tmp_path / "plain")).ok()
    assert results(tmp_path / "packed")["eval_loss"] == results(tmp_path / "plain")["eval_loss"]
    refused = in_process(*stage("pt", tiny("bloom"), records, tmp_path / "pt", "--isolate_documents"))
    assert refused.code == 2 and "--isolate_documents: bloom does not use position_ids" in refused.stderr


def test_packing_through_the_script(tiny, records, tmp_path):
    in_process(*stage("sft", tiny("llama"), records, tmp_path / "out", "--packing", "--packing_length", 128)).ok()
    short = in_process(*stage("sft", tiny("llama"), records, tmp_path / "no", "--packing", "--packing_length", 64))
    assert short.code == 2 and "--packing_length 64 cannot hold a conversation of 96 tokens" in short.stderr
    in_process(*stage("pt", tiny("llama"), records, tmp_path / "pt", "--isolate_documents")).ok()


def test_documents_are_numbered_anew_when_isolated():
    documents = [{"input_ids": [11, 12, 2]}, {"input_ids": [13, 14, 15, 16, 2]}]
    assert list(pack_documents(documents, pad_token_id=0, block_size=5, isolate=False)) == [
        {"input_ids": [11, 12, 2, 13, 14], "labels": [11, 12, 2, 13, 14], "attention_mask": [1] * 5},
        {"input_ids": [15, 16, 2, 0, 0], "labels": [15, 16, 2, -100, -100], "attention_mask": [1, 1, 1, 0, 0]},
    ]
    assert list(pack_documents(documents, pad_token_id=0, block_size=5, isolate=True)) == [
        {"input_ids": [11, 12, 2, 13, 14], "labels": [-100, 12, 2, -100, 14], "position_ids": [0, 1, 2, 0, 1]},
        {"input_ids": [15, 16, 2, 0, 0], "labels": [-100, 16, 2, -100, -100], "position_ids": [0, 1, 2, 0, 0]},
    ]
    (*_, last) = pack_documents([{"input_ids": [*range(5, 17)]}, *documents], 0, block_size=8, isolate=True)
    assert last["position_ids"] == [0, 1, 2, 3, 0, 0, 0, 0] and max(last["position_ids"]) < 8


@pytest.mark.parametrize("isolate", [False, True])
def test_a_last_block_that_trains_nothing_is_left_out(isolate):
    """A step on it would have a loss of 0: its only token is nothing's next one."""
    documents = [{"input_ids": [11, 12, 2]}, {"input_ids": [13, 14, 2]}]
    blocks = list(pack_documents(documents, pad_token_id=0, block_size=5, isolate=isolate))
    assert [block["input_ids"] for block in blocks] == [[11, 12, 2, 13, 14]]
    assert list(pack_documents([], pad_token_id=0, block_size=5, isolate=isolate)) == []


def test_documents_get_what_the_tokenizer_puts_around_a_text(tiny, tmp_path):
    """LLaMA's and Gemma's put bos in front; eos is behind each once."""
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for single, front in (("$A", []), ("<|im_start|> $A", [bos]), ("<|im_start|> $A <|im_end|>", [bos])):
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
        args = PretrainingArguments(output_dir=str(tmp_path), block_size=64)
        rows, data_args = Dataset.from_list([{"text": "Fever."}]), DataArguments("unused", overwrite_cache=True)
        (block,) = build_blocks(rows, tokenizer, data_args, args)
        text = tokenizer("Fever.", add_special_tokens=False)["input_ids"]
        assert [token for token in block["labels"] if token != -100] == [*front, *text, eos]


def test_preview_shows_what_is_trained_and_reads_no_weights(tiny, records, tmp_path):
    broken = tmp_path / "model"
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(broken)
    (broken / "config.json").write_bytes((tmp_path.__class__(tiny("llama")) / "config.json").read_bytes())
    for name in ("pt", "sft", "rm", "rl"):
        flags = ("--reward_model_name_or_path", "none") if name == "rl" else ()
        shown = in_process(*stage(name, broken, records, tmp_path / name, "--preview", 2, *flags)).ok().stdout
        assert shown.count("--- record 2") == (2 if name == "rm" else 1)
        assert ("max_source_length  records cut     tokens lost" in shown) == (name != "pt")
        assert ("[[" in shown) == (name in ("pt", "sft"))
    assert not (tmp_path / "sft" / "adapter_config.json").exists()
    flags = ("--preview", 2, "--streaming", "--max_steps", 3)
    shown = in_process(*stage("pt", broken, records, tmp_path / "pt", *flags)).ok().stdout
    assert shown.count("--- record") == 2 and "2 records" in shown


def test_tokenized_rows_are_kept_until_something_changes(tiny, records):
    calls = []
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    folder = str(records / "sft")
    for lengths, template, expected in (
        (64, tokenizer.chat_template, 8),
        (64, tokenizer.chat_template, 8),
        (65, tokenizer.chat_template, 16),
        (64, tokenizer.chat_template.replace("user", "asker") + " ", 24),
    ):
        tokenizer.chat_template = template
        args = DataArguments(folder, folder, keep_duplicates=True, max_source_length=lengths)
        rows, _ = args.load_conversations()

        def encode(row, args=args):
            calls.append(1)
            return args.encode(tokenizer, row["messages"])

        args.tokenize(rows, encode, tokenizer)
        assert len(calls) == expected


DOCS = [{"text": f"Document {n} tells of " + " ".join(f"thing{n * 7 + i}" for i in range(20))} for n in range(6)]


def test_streaming_goes_on_where_it_was_cut_before_and_after_a_full_pass(tiny, tmp_path):
    """Cut at step 1, and at step 7 in the second pass, a run ends with the weights of one that was not."""
    write_lines(tmp_path / "data" / "pt", DOCS)
    flags = ("--streaming", "--max_steps", 9, "--save_strategy", "steps", "--save_steps", 1, "--save_total_limit", 9)
    command = [tiny("llama"), tmp_path / "data", tmp_path / "whole", *flags, "--per_device_train_batch_size", 4]
    in_process(*stage("pt", *command, "--lora_dropout", 0.1)).ok()
    losses = history(tmp_path / "whole", "loss")
    assert len(losses) == 9 and losses[-1] < losses[0]
    args = PretrainingArguments(output_dir=str(tmp_path), block_size=32)
    rows, tokenizer = (
        Dataset.from_list(DOCS),
        AutoTokenizer.from_pretrained(tiny("llama")),
    )
    a_pass = len(build_blocks(rows, tokenizer, DataArguments("unused"), args)) / 4
    for cut in (1, 7):
        assert (cut == 1) == (cut < a_pass)
        command[2] = tmp_path / f"cut {cut}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{cut}", command[2] / f"checkpoint-{cut}")
        ended = in_process(*stage("pt", *command, "--lora_dropout", 0.1)).ok()
        assert f"Going on from {command[2]}" in ended.stderr
        assert history(command[2], "loss") == losses
        one, other = (load_file(folder / ADAPTER) for folder in (tmp_path / "whole", command[2]))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_streamed_blocks_are_of_passes_without_end_each_mixed_anew(tiny, tmp_path):
    tokenizer, rows = (
        AutoTokenizer.from_pretrained(tiny("llama")),
        Dataset.from_list(DOCS),
    )
    args = PretrainingArguments(output_dir=str(tmp_path), block_size=32, streaming=True, max_steps=1)
    stream = build_blocks(rows, tokenizer, DataArguments("unused"), args, seed=1)
    text = tokenizer.decode([token for row in stream.take(400) for token in row["input_ids"]])
    order = re.findall(r"Document (\d)", text)
    passes = ["".join(order[i : i + 6]) for i in range(0, 18, 6)]
    assert all(sorted(one) == list("012345") for one in passes) and len(set(passes)) == 3
    (held_out, again) = (list(build_blocks(rows, tokenizer, DataArguments("unused"), args)) for _ in range(2))
    assert held_out == again and sum(0 in row["attention_mask"] for row in held_out) <= 1
