"""From rows to tokens: records that the chat template refuses, what is trained, what is kept on disk and for whom."""

import json
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import trl
from conftest import QUESTIONS, in_process, stage, write_lines
from tiny_models import CHATML
from transformers import AutoTokenizer, TrainingArguments

from arguments.command_line import UserError
from arguments.data import DataArguments
from arguments.model import ModelArguments
from reward_modeling import build_dataset as build_pairs
from supervised_finetuning import build_dataset, pack

# As Mistral's of 2023: questions and answers must alternate, so no tool may speak
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GOOD = [{"prompt": f"What is {n}?", "completion": f"{n}, that is."} for n in ("one", "two", "three", "four")]
TURNS = (("user", "q"), ("assistant", "f()"), ("tool", "1"), ("assistant", "a"))
TOOL = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
REASON = "the chat template refuses a conversation: roles must alternate"


@pytest.fixture(scope="module")
def strict(tiny, tmp_path_factory):
    """A tiny llama whose chat template refuses tools."""
    folder = tmp_path_factory.mktemp("strict") / "model"
    shutil.copytree(tiny("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = ALTERNATING
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("records", [[TOOL, *GOOD], [*GOOD[:2], TOOL, *GOOD[2:]]], ids=["first", "third"])
@pytest.mark.parametrize("workers", [None, 2])
def test_a_record_that_the_template_refuses_is_a_bad_record(strict, tmp_path, records, workers):
    train = write_lines(tmp_path / "train", records)
    held_out = write_lines(tmp_path / "held_out", [{"prompt": "What is five?", "completion": "5"}])
    place = f"{train}/rows.jsonl:{records.index(TOOL) + 1}"
    tokenizer = AutoTokenizer.from_pretrained(strict)

    def load(bad_records):
        args = DataArguments(str(train), str(held_out), bad_records=bad_records, preprocessing_num_workers=workers)
        return build_dataset(args.load_conversations(str(tmp_path / "out"))[0], tokenizer, args)

    with pytest.raises(UserError) as error:
        load("error")
    assert f"1 bad records (--bad_records skip goes on without them)\n  {place}: {REASON}" in str(error.value)
    for _ in range(2):  # the second time from disk
        dataset = load("skip")
        assert len(dataset) == 4 and "bad" not in dataset.column_names
        assert all("that is" in tokenizer.decode(ids) for ids in dataset["input_ids"])
        (listed,) = map(json.loads, (tmp_path / "out" / "bad_records.jsonl").read_text().splitlines())
        assert (listed["place"], listed["reason"]) == (place, REASON)
        assert json.loads(listed["record"])["messages"] == TOOL["messages"]


def test_refused_records_through_the_script(strict, tmp_path):
    data, output = tmp_path / "data", tmp_path / "out"
    write_lines(data / "sft", [*GOOD, TOOL])
    refused = in_process(*stage("sft", strict, data, output))
    assert refused.code == 2 and f"{data}/sft/rows.jsonl:5: {REASON}" in refused.stderr
    in_process(*stage("sft", strict, data, output, "--bad_records", "skip")).ok()
    assert "rows.jsonl:5" in (output / "bad_records.jsonl").read_text()


def test_a_record_whose_tool_the_template_leaves_out_is_a_bad_record(tiny, tmp_path):
    folder = write_lines(tmp_path / "data", [*GOOD, TOOL])
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.chat_template = CHATML.replace("in messages", "in messages if message['role'] != 'tool'")
    args = DataArguments(str(folder), str(folder), keep_duplicates=True)
    with pytest.raises(
        UserError, match=r"1 bad records .*\n.*rows.jsonl:5: the chat template leaves out the tool turn"
    ):
        build_dataset(args.load_conversations()[0], tokenizer, args)


def test_a_template_that_refuses_all_is_said_once(strict, tmp_path):
    folder = write_lines(tmp_path / "data", [TOOL, TOOL | {"id": 2}])
    args = DataArguments(str(folder), str(folder), keep_duplicates=True, bad_records="skip")
    rows, _ = args.load_conversations()
    with pytest.raises(UserError, match=r"no record can be used, of 2; the first .*rows.jsonl:1: .*must alternate"):
        build_dataset(rows, AutoTokenizer.from_pretrained(strict), args)


def test_a_clean_run_removes_the_list_of_an_earlier_one(tmp_path):
    listed = Path(tmp_path / "out" / "bad_records.jsonl")
    for records, there in (([*GOOD, {"prompt": "q"}], True), (GOOD, False)):
        folder = write_lines(tmp_path / "data", records)
        DataArguments(str(folder), bad_records="skip").load_conversations(str(tmp_path / "out"))
        assert listed.exists() == there


def test_train_on_inputs_trains_all_turns(tiny, tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, *TOOL["messages"]]
    folder = write_lines(tmp_path / "data", [{"messages": turns}, GOOD[0]])
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    args = DataArguments(str(folder), str(folder), keep_duplicates=True)
    rows, _ = args.load_conversations()
    answers = build_dataset(rows, tokenizer, args)  # first: the cache must tell the two apart
    everything = build_dataset(rows, tokenizer, args, train_on_inputs=True)
    assert everything["input_ids"][:] == answers["input_ids"][:]
    assert [labels[0] for labels in everything["labels"]] == [-100, -100]  # nothing of its text foretells the first
    assert [labels[1:] for labels in everything["labels"]] == [ids[1:] for ids in everything["input_ids"]]
    assert all(labels.count(-100) > 9 for labels in answers["labels"])


def test_train_on_inputs_through_the_script(tiny, records, tmp_path):
    counts = []
    for number, flags in enumerate([(), ("--train_on_inputs",)]):
        shown = in_process(*stage("sft", tiny("llama"), records, tmp_path / str(number), "--preview", 1, *flags)).ok()
        counts.append(float(shown.stdout.partition("% of them trained")[0].rpartition(" ")[2]))
    assert counts[0] < 60 and counts[1] > 95


def test_a_token_without_an_embedding_is_a_bad_record(tiny, tmp_path):
    """gemma3's tokenizer has one id more than the model has embeddings."""
    bad = {"prompt": "What is <image_soft_token>?", "completion": "Nothing."}
    folder = write_lines(tmp_path / "data", [*GOOD, bad])
    command = stage("sft", tiny("gemma3"), tmp_path, tmp_path / "out", "--train_file_dir", folder)
    command += ["--validation_file_dir", folder]
    ended = in_process(*command)
    assert ended.code == 2 and "rows.jsonl:5: the token '<image_soft_token>' has the id 400" in ended.stderr
    in_process(*command, "--bad_records", "skip").ok()
    (tmp_path / "q.txt").write_text(bad["prompt"])
    flags = ("--data_file", tmp_path / "q.txt", "--predictions_file", tmp_path / "a.jsonl")
    ended = in_process("inference.py", "--base_model", tiny("gemma3"), *flags)
    assert ended.code == 2 and "'<image_soft_token>' has the id 400" in ended.errors[0]


@pytest.mark.parametrize(("name", "sides"), [("sft", (1,)), ("rm", (1, 2))])
def test_cut_answers_are_told(tiny, records, tmp_path, name, sides):
    command = stage(name, tiny("llama"), records, tmp_path / "out", "--preview", 1, "--max_target_length")
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    lengths = sorted(len(tokenizer(row[side])["input_ids"]) + 1 for row in QUESTIONS for side in sides)  # and its end
    limit = lengths[-3] - 1
    cut = sum(length > limit for length in lengths)
    assert "are longer than" not in in_process(*command, lengths[-1]).ok().stderr
    told = f"{cut} of {len(lengths)} answers are longer than --max_target_length {limit}: their ends are cut off"
    assert 3 <= cut < len(lengths) and told in in_process(*command, limit).ok().stderr


def test_workers_make_equal_rows(tiny, tmp_path):
    folder = write_lines(tmp_path / "data", [row | {"system": f"s{n}"} for n in range(5) for row in GOOD])
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    made = []
    for workers in (None, 2):
        args = DataArguments(str(folder), str(folder), keep_duplicates=True, preprocessing_num_workers=workers)
        args.overwrite_cache = True
        made.append(build_dataset(args.load_conversations()[0], tokenizer, args)[:])
    assert made[0] == made[1] and len(made[0]["input_ids"]) == 20


def test_only_the_main_process_tokenizes_with_overwrite_cache(tiny, tmp_path, monkeypatch):
    folder = write_lines(tmp_path / "data", GOOD)
    args = DataArguments(str(folder), str(folder), keep_duplicates=True, overwrite_cache=True)
    tokenizer, calls, rows = AutoTokenizer.from_pretrained(tiny("llama")), [], args.load_conversations()[0]

    def encode(row):
        calls.append(1)
        return args.encode(tokenizer, row["messages"])

    found = []
    for rank, count in ((0, 4), (0, 8), (1, 8), (0, 12)):
        state = SimpleNamespace(is_local_main_process=not rank, local_main_process_first=nullcontext)
        monkeypatch.setattr("arguments.data.PartialState", lambda state=state: state)
        found.append(args.tokenize(rows, encode, tokenizer)[:])
        assert len(calls) == count
    assert all(other == found[0] for other in found)


def test_only_the_main_process_packs(tiny, records, tmp_path, monkeypatch):
    """The others wait for it, and then find its file."""
    inside, entered, pack_dataset = [False], [], trl.pack_dataset

    @contextmanager
    def main_process_first(self, **kwargs):
        inside[0] = True
        yield
        inside[0] = False

    def noted(*args, **kwargs):
        entered.append(inside[0])
        return pack_dataset(*args, **kwargs)

    monkeypatch.setattr(TrainingArguments, "main_process_first", main_process_first)
    monkeypatch.setattr(trl, "pack_dataset", noted)
    in_process(*stage("sft", tiny("llama"), records, tmp_path / "out", "--packing", "--max_steps", 1)).ok()
    assert entered == [True]

    args = DataArguments(str(records / "sft"), str(records / "sft"), keep_duplicates=True)
    rows = build_dataset(args.load_conversations()[0], AutoTokenizer.from_pretrained(tiny("llama")), args)
    assert pack(rows, 512).cache_files == pack(rows, 512).cache_files != []


def test_long_pairs_are_cut_not_dropped(tiny, tmp_path):
    """Only the pair whose answers differ behind the limit is a bad one."""
    long = "word " * 90
    pairs = [("q " * 300, "Yes.", "No."), ("q", "Yes, " + long, "No, " + long), ("q2", long + "yes", long + "no")]
    records = [{"prompt": q, "chosen": good, "rejected": bad} for q, good, bad in pairs]
    folder = write_lines(tmp_path / "data", records)
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    limits = {"max_source_length": 40, "max_target_length": 20}

    def load(**kwargs):
        args = DataArguments(str(folder), str(folder), keep_duplicates=True, **limits, **kwargs)
        return build_pairs(args.load_pairs()[0], tokenizer, args)

    with pytest.raises(UserError) as error:
        load()
    assert "rows.jsonl:3: chosen and rejected are the same up to --max_target_length 20" in str(error.value)
    assert "1 bad records" in str(error.value)
    first, second = load(bad_records="skip")
    assert first["source_tokens"] > 300 and len(first["chosen_ids"]) == 40 + first["chosen_tokens"]
    assert second["chosen_tokens"] > 90 and len(second["chosen_ids"]) == second["source_tokens"] + 20
    assert second["chosen_ids"] != second["rejected_ids"]


def test_a_tokenizer_model_alone(tiny, records, tmp_path):
    """Bases of 2023 came without a tokenizer.json: sentencepiece reads theirs, and the tokens are its own."""
    text = "\n".join(path.read_text("utf-8") for path in (records / "pt").iterdir())
    (tmp_path / "text.txt").write_text(text, "utf-8")
    like_llama = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "character_coverage": 1.0}
    like_llama |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    prefix, files = str(tmp_path / "tokenizer"), {"input": str(tmp_path / "text.txt")}
    sentencepiece.SentencePieceTrainer.train(
        **files, model_prefix=prefix, vocab_size=390, **like_llama, hard_vocab_limit=False
    )
    base = shutil.copytree(tiny("llama"), tmp_path / "base")
    for file in [*base.glob("token*"), *base.glob("*.jinja")]:
        file.unlink()
    shutil.copy(tmp_path / "tokenizer.model", base)
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    tokenizer = ModelArguments(model_name_or_path=str(base)).load_tokenizer()
    own = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    for line in ("高血压患者平时要注意什么？", "Blood  carries 12 mg\nof oxygen", "🤒"):
        assert tokenizer(line)["input_ids"] == [own.bos_id(), *own.encode(line)]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], return_dict=False)
    assert chat[0] == tokenizer.bos_token_id not in chat[1:], "begun as all of its texts"
    bloom = ModelArguments(model_name_or_path=tiny("bloom")).load_tokenizer()
    assert bloom.bos_token and not bloom.chat_template.startswith("{{ bos_token }}"), "which it does not add"
    ended = in_process(*stage("sft", base, records, tmp_path / "sft", "--preview", 1)).ok()
    assert "plain User/Assistant" in ended.stderr
