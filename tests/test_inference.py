"""inference.py as its users call it: a chat, a file of questions, models compared."""

import fcntl
import io
import json
import os
import shutil
from unittest.mock import Mock

import pytest
import torch
from conftest import ADAPTER, in_process, merge, stage
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_recurrent
from transformers import AutoModelForCausalLM, AutoTokenizer

from arguments import atomic
from arguments.command_line import Fault, UserError
from arguments.model import check_finite
from arguments.reward import RewardModel
from inference import Answerer, InferenceArguments, find_adapter, load_scorer, score

QUESTIONS = "What does the heart do?\n高血压要注意什么？\nHow is asthma treated?\n"


@pytest.fixture(scope="module")
def trained(tiny, records, tmp_path_factory):
    """An SFT adapter, the same merged, and a reward model on it."""
    folder = tmp_path_factory.mktemp("inference")
    in_process(*stage("sft", tiny("llama"), records, folder / "sft")).ok()
    in_process(*merge(tiny("llama"), folder / "sft", folder / "merged")).ok()
    in_process(*stage("rm", folder / "merged", records, folder / "rm")).ok()
    return folder


def test_questions_that_padding_would_change_are_answered_apart(tmp_path):
    name = save_tiny_recurrent(tmp_path / "model")
    questions = [[{"role": "user", "content": text}] for text in QUESTIONS.splitlines()]
    args = InferenceArguments(name, dtype="float32", max_new_tokens=8, only_cpu=True)
    answerer = Answerer(name, args)
    alone = [answerer.answer([question])[0] for question in questions]
    assert list(answerer.answer_all(questions)) == alone
    assert answerer.answer(questions) != alone, "this test needs a model that padding confuses"


def test_a_character_that_the_limit_cuts_is_left_out(tiny):
    answerer = Answerer(tiny("gpt2"), InferenceArguments(tiny("gpt2"), only_cpu=True, with_prompt=False))
    asked = answerer.tokenizer("Hi", return_tensors="pt")["input_ids"]
    for text, cut, expected in (("yes 脑", 1, "yes"), ("yes", 0, "yes"), ("脑", 1, "")):
        ids = answerer.tokenizer(text, return_tensors="pt")["input_ids"]
        found = torch.cat([asked, ids[:, : ids.shape[1] - cut]], 1)
        answerer.model.generate = Mock(return_value=found)
        assert "\ufffd" in answerer.tokenizer.decode(found[0]) or not cut, "this test needs bytes as tokens"
        assert answerer.answer([[{"role": "user", "content": "Hi"}]]) == [(expected, False)]


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def ask(*flags):
    return in_process("inference.py", "--max_new_tokens", 6, *flags)


def test_a_file_is_answered_and_gone_on_with(tiny, trained, tmp_path):
    (tmp_path / "q.txt").write_text(QUESTIONS, encoding="utf-8")
    common = ("--data_file", tmp_path / "q.txt", "--dtype", "float32")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    ask("--base_model", trained / "merged", *common, "--predictions_file", one, "--batch_size", 2).ok()
    assert [row["Input"] for row in lines(one)] == QUESTIONS.splitlines()
    # the adapter on its base answers as the merged model does, also in batches of one
    flags = ("--base_model", tiny("llama"), "--lora_model", trained / "sft", "--batch_size", 1)
    ask(*flags, *common, "--predictions_file", two).ok()
    assert [row["Output"] for row in lines(two)] == [row["Output"] for row in lines(one)]
    other = ask("--base_model", trained / "merged", *common, "--predictions_file", two)
    assert other.code == 2 and f"holds answers of {trained / 'sft'}, not of {trained / 'merged'}" in other.stderr

    whole = one.read_text("utf-8")
    cut = whole.splitlines(keepends=True)[0].encode() + whole.splitlines()[1].encode()[:13]  # within a character
    one.write_bytes(cut)
    said = ask("--base_model", trained / "merged", *common, "--predictions_file", one).ok()
    assert "1 of 3 answers are in" in said.stderr and one.read_text("utf-8") == whole
    said = ask("--base_model", trained / "merged", *common, "--predictions_file", one).ok()
    assert "3 of 3 answers are in" in said.stderr and one.read_text("utf-8") == whole
    (tmp_path / "q.txt").write_text("Another?\n")
    other = ask("--base_model", trained / "merged", *common, "--predictions_file", one)
    assert other.code == 2 and "holds answers to other questions" in other.stderr
    assert one.read_text("utf-8") == whole
    one.write_text("no line of ours\n")
    other = ask("--base_model", trained / "merged", *common, "--predictions_file", one)
    assert other.code == 2 and "is not of lines" in other.stderr and one.read_text() == "no line of ours\n"


def test_answers_go_to_a_pipe_in_the_files_order(tiny, tmp_path):
    """The questions are answered by length, and a pipe is not read, as a file of earlier answers would be."""
    asked = [QUESTIONS.splitlines()[i % 3] * (1 + i % 4) for i in range(10)]
    (tmp_path / "q.txt").write_text("\n".join(asked), encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    call = "--base_model", tiny("llama"), "--data_file", tmp_path / "q.txt", "--batch_size", 2, "--dtype", "float32"
    ask(*call, "--predictions_file", tmp_path / "pipe").ok()
    ask(*call, "--predictions_file", tmp_path / "a.jsonl").ok()
    found = os.read(reader, 2**16).decode()
    os.close(reader)
    assert found == (tmp_path / "a.jsonl").read_text("utf-8")
    assert [row["Input"] for row in lines(tmp_path / "a.jsonl")] == asked


def test_two_calls_do_not_write_into_one_file(tiny, tmp_path, monkeypatch):
    """One begins while the other loads its model."""
    monkeypatch.setattr(atomic, "PATIENCE", 0.1)
    (tmp_path / "q.txt").write_text(QUESTIONS, encoding="utf-8")
    call = "--base_model", tiny("llama"), "--data_file", tmp_path / "q.txt", "--predictions_file", tmp_path / "a.jsonl"
    (tmp_path / "a.jsonl").touch()
    with (tmp_path / "a.jsonl").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ended = ask(*call)
    assert ended.code == 2 and "another call is writing there" in ended.errors[0]
    ask(*call, "--max_eval_samples", 2).ok()
    ask(*call, "--max_eval_samples", 1).ok()
    assert len(lines(tmp_path / "a.jsonl")) == 2


@pytest.fixture
def begun(trained, tmp_path):
    """A call that has answered three questions, one of them with turns before it; and a copy of its model."""
    shutil.copytree(trained / "merged", tmp_path / "m")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    rows = [{"prompt": q} for q in QUESTIONS.splitlines()]
    rows[1] = {"messages": [*turns, {"role": "user", "content": rows[1]["prompt"]}]}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--data_file", tmp_path / "q.jsonl", "--predictions_file", tmp_path / "a.jsonl")
    ask("--base_model", tmp_path / "m", *flags).ok()
    return flags


def test_answers_that_this_call_would_not_give_are_not_gone_on_with(begun, tmp_path):
    answers, questions = tmp_path / "a.jsonl", tmp_path / "q.jsonl"
    before, text, same = answers.read_bytes(), questions.read_text(), ("--base_model", tmp_path / "m", *begun)
    assert [len(row.get("Messages", [1])) for row in lines(answers)] == [1, 3, 1]
    assert "3 of 3 answers are in" in ask(*same).ok().stderr
    assert "2 of 2 answers are in" in ask(*same, "--max_eval_samples", 2).ok().stderr
    ask("--base_model", tmp_path / "m" / ".." / "m", *begun).ok()
    cases = {
        "by another --max_new_tokens": ("--max_new_tokens", 7),
        "by another --temperature": ("--temperature", 0.5),
        "another system text, or other turns": ("--system", "Be brief."),
    }
    for said, flags in cases.items():
        ended = in_process("inference.py", "--max_new_tokens", 6, *same, *flags)
        assert ended.code == 2 and said in ended.errors[0]
    questions.write_text(text.replace("Hello", "Good day"))
    assert "other turns before them" in ask(*same).errors[0]
    questions.write_text(text.splitlines()[0] + "\n")
    assert "to other questions" in ask(*same).errors[0], "the file holds more answers than there are questions"
    questions.write_text(text)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, tmp_path / "m" / "model.safetensors")
    assert "by other weights in that folder" in ask(*same).errors[0]
    assert answers.read_bytes() == before


def test_bad_questions_are_named_without_a_flag_that_is_not_there(trained, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"prompt": "Why?"}\n{"promt": "How?"}\n')
    (said,) = ask("--base_model", trained / "merged", "--data_file", tmp_path / "q.jsonl").errors
    assert "1 bad records" in said and "--bad_records" not in said


def test_no_model_is_loaded_when_all_answers_are_there(begun, tmp_path, monkeypatch):
    same = ("--base_model", tmp_path / "m", *begun)
    ask(*same).ok()
    whole = (tmp_path / "a.jsonl").read_bytes()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for flags in (same, (*same, "--max_eval_samples", 2)):
        assert "answers are in" in ask(*flags).ok().stderr
    assert (tmp_path / "a.jsonl").read_bytes() == whole


def test_samples_of_another_seed_are_not_gone_on_with(begun, tmp_path):
    (tmp_path / "a.jsonl").unlink()
    same = ("--base_model", tmp_path / "m", *begun, "--temperature", 1)
    ask(*same, "--max_eval_samples", 2, "--seed", 1).ok()
    assert "by another --seed" in ask(*same, "--seed", 2).errors[0]
    assert "2 of 3 answers are in" in ask(*same, "--seed", 1).ok().stderr


def test_a_sampled_answer_depends_on_its_seed_and_number_alone(tiny, trained, tmp_path):
    """Not on the batch, on a call that goes on, or on the models asked before; the same question is drawn anew."""
    (tmp_path / "q.txt").write_text("What is flu?\nWhat is flu?\nWhy do hearts beat so?\nWhat is flu?\n")
    flags = ("--data_file", tmp_path / "q.txt", "--temperature", 1.5, "--top_p", 0.9, "--dtype", "float32")

    def answers(name, *more):
        path = tmp_path / f"{name}.jsonl"
        ask(*flags, "--predictions_file", path, *more).ok()
        return [row["Output"] for row in lines(path)]

    base, merged = str(tiny("llama")), str(trained / "merged")
    whole = answers("whole", "--base_model", base)
    assert len(set(whole)) == 4 and answers("again", "--base_model", base, "--batch_size", 1) == whole
    assert answers("other", "--base_model", base, "--seed", 1) != whole
    answers("parts", "--base_model", base, "--max_eval_samples", 1)
    assert answers("parts", "--base_model", base) == whole
    assert [row[base] for row in answers("first", "--compare", base, merged)] == whole
    assert [row[base] for row in answers("second", "--compare", merged, base)] == whole


def test_top_p_and_temperature_shape_what_is_drawn(tiny):
    args = InferenceArguments(tiny("llama"), temperature=2.0, top_p=0.6, max_new_tokens=1, only_cpu=True)
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log() * 2  # at this temperature the probabilities; the third is left out
    drawn = [Answerer.drawn(Mock(args=args, model=Mock(device="cpu")), [i], 1) for i in range(400)]
    tokens = torch.cat([processors(torch.zeros(1, 1), logits).argmax(-1) for processors in drawn])
    assert set(tokens.tolist()) == {0, 1}
    assert tokens.float().mean().item() == pytest.approx(3 / 8, abs=0.08)  # 0.3 of 0.8; three standard errors


def test_answers_of_older_versions_are_gone_on_with(begun, tmp_path):
    old = [{key: row[key] for key in ("Input", "Output", "Model")} for row in lines(tmp_path / "a.jsonl")[:2]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    assert "2 of 3 answers are in" in ask("--base_model", tmp_path / "m", *begun).ok().stderr
    assert len(lines(tmp_path / "a.jsonl")) == 3


def test_an_adapter_retrained_in_its_folder_is_seen(tiny, trained, tmp_path):
    (tmp_path / "q.txt").write_text(QUESTIONS, encoding="utf-8")
    adapter = shutil.copytree(trained / "sft", tmp_path / "sft")
    flags = ("--base_model", tiny("llama"), "--lora_model", adapter, "--data_file", tmp_path / "q.txt")
    ask(*flags, "--predictions_file", tmp_path / "a.jsonl").ok()
    weights = load_file(adapter / ADAPTER)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, adapter / ADAPTER)
    assert "by other weights" in ask(*flags, "--predictions_file", tmp_path / "a.jsonl").errors[0]


def test_a_system_text_goes_before_questions_without_one(trained, tmp_path):
    rows = [{"prompt": "What is flu?"}, {"prompt": "What is flu?", "system": "At length."}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--data_file", tmp_path / "q.jsonl", "--predictions_file", tmp_path / "a.jsonl", "--system", "Be brief.")
    ask("--base_model", trained / "merged", *flags).ok()
    told = [row["Messages"][0] for row in lines(tmp_path / "a.jsonl")]
    assert told == [{"role": "system", "content": text} for text in ("Be brief.", "At length.")]


def test_an_adapter_is_asked_by_its_own_tokenizer(tiny, trained, tmp_path):
    """After a merge in place it lies in the folder above the adapter's."""
    own = "{{ messages[-1]['content'] }} it was"
    adapter = shutil.copytree(trained / "sft", tmp_path / "sft")
    (adapter / "chat_template.jinja").write_text(own)

    def template(folder, **flags):
        args = InferenceArguments(base_model=tiny("llama"), lora_model=str(folder), **flags)
        return Answerer(tiny("llama"), args, str(folder)).tokenizer.chat_template

    assert template(adapter) == own != template(adapter, tokenizer_path=tiny("llama"))
    in_process(*merge(tiny("llama"), adapter, adapter)).ok()
    assert template(adapter) == template(adapter / "adapter") == own
    (adapter / "tokenizer_config.json").unlink()
    assert template(adapter) != own, "the base's, where the adapter has none"


def test_a_model_that_overflows_float16_is_said(tiny):
    """A T4 computes in it, and Gemma 3's activations do not fit."""
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float16)
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    check_finite(model, tokenizer, "take another")
    model.model.norm.weight.data.fill_(6e4)
    with pytest.raises(UserError, match="overflows float16, which suits this GPU: take another"):
        check_finite(model, tokenizer, "take another")
    check_finite(model.bfloat16(), tokenizer, "take another")


def test_an_adapter_that_names_no_task_answers(tiny, trained, tmp_path):
    """As plain peft saves one; a reward model's would be named one."""
    folder = shutil.copytree(trained / "sft", tmp_path / "sft")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"task_type": None}))
    assert find_adapter(str(folder), tiny("llama"), InferenceArguments(base_model=tiny("llama"))) == folder


def test_models_are_compared(tiny, trained, records, tmp_path, monkeypatch):
    output = tmp_path / "new" / "folder" / "compared.jsonl"
    flags = ("--compare", tiny("llama"), trained / "merged", "--reward_model", trained / "rm", "--data_file")
    printed = ask(*flags, records / "rl", "--predictions_file", output, "--max_eval_samples", 3).ok().stdout
    assert f"{tiny('llama')}: " in printed and f"wins against {tiny('llama')}: 0.50" in printed
    assert "3 questions" in printed
    for row in lines(output):
        assert row["Output"].keys() == row["Score"].keys() == {tiny("llama"), str(trained / "merged")}
    kept = tmp_path / "kept.jsonl"
    failing = ("--compare", tiny("llama"), "--data_file", records / "rl", "--predictions_file", kept)
    ended = ask(*failing, "--max_eval_samples", 3, "--reward_model", tiny("llama"))
    assert ended.code == 2 and "which has no score head" in ended.errors[0]
    assert "Answering" not in ended.stderr and not kept.exists(), "a wrong reward model is said at once"
    monkeypatch.setattr(RewardModel, "forward", Mock(side_effect=Fault("out of luck")))
    ended = ask(*failing, "--max_eval_samples", 3, "--reward_model", trained / "rm")
    assert ended.code == 1 and "out of luck" in ended.errors[0]
    assert len(lines(kept)) == 3, "the answers, though they could not be scored"


def test_a_reward_model_judges_in_the_precision_of_rl(tiny, trained, monkeypatch):
    """On a CPU in float32, also where it answers in bfloat16."""
    monkeypatch.setattr("inference.best_precision", lambda **_: "bf16")
    flags = {"compare": [tiny("llama")], "data_file": "q", "reward_model": str(trained / "rm"), "only_cpu": True}
    for dtype, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        args = InferenceArguments(**flags, dtype=dtype)
        assert args.model_args(tiny("llama")).dtype == "bfloat16"
        assert next(load_scorer(args).parameters()).dtype == expected


def test_compared_answers_go_through_a_link(tiny, tmp_path):
    (tmp_path / "q.txt").write_text("What is flu?\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    flags = ("--data_file", tmp_path / "q.txt", "--predictions_file", tmp_path / "link.jsonl", "--max_new_tokens", 2)
    ask("--compare", tiny("llama"), *flags).ok()
    assert (tmp_path / "link.jsonl").is_symlink() and len(lines(tmp_path / "real.jsonl")) == 1


def test_an_answer_that_was_cut_is_scored_as_one(tiny, trained):
    """Without the token that ends an answer, as RL scores it."""
    name = tiny("llama")
    args = InferenceArguments(compare=[name], reward_model=str(trained / "rm"), data_file="asked", max_new_tokens=4)
    asked = [[{"role": "user", "content": "What is flu?"}]] * 2
    first, second = score(args, asked, {name: [("A virus", True), ("A virus", False)]})[name]
    assert first != second
    ((_, ended),) = Answerer(name, args).answer(asked[:1])
    assert not ended


def test_a_comparison_replaces_nothing_but_a_comparison(tiny, tmp_path):
    one, compared, flags = tmp_path / "one.jsonl", tmp_path / "compared.jsonl", ("--max_eval_samples", 1)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"prompt": "What is flu?"}\n')
    ask("--base_model", tiny("llama"), "--data_file", questions, "--predictions_file", one, *flags).ok()
    for kept in (one, questions):
        before = kept.read_bytes()
        ended = ask("--compare", tiny("llama"), "--data_file", questions, "--predictions_file", kept, *flags)
        assert ended.code == 2 and "holds something else than compared answers" in ended.errors[0]
        assert kept.read_bytes() == before
    for _ in range(2):
        ask("--compare", tiny("llama"), "--data_file", questions, "--predictions_file", compared, *flags).ok()


def test_a_question_leaves_positions_for_its_answer(tiny, tmp_path):
    """gpt2 has a table of 1,024: a longer row ended in a traceback."""
    (tmp_path / "q.txt").write_text("heart " * 1500)
    flags = ("--data_file", tmp_path / "q.txt", "--predictions_file", tmp_path / "a.jsonl")
    ask("--base_model", tiny("gpt2"), *flags, "--max_source_length", 2000).ok()


def test_the_likeliest_token_is_taken_whatever_the_model_came_with(trained, tmp_path):
    """Its generation_config.json asks for another way to sample, as published chat models do."""
    (tmp_path / "q.txt").write_text(QUESTIONS, encoding="utf-8")
    flags = ("--data_file", tmp_path / "q.txt", "--max_new_tokens", 12)
    flags += ("--model_type", "llama", "--resize_emb", "False")  # of 2023
    ask("--base_model", trained / "merged", *flags, "--predictions_file", tmp_path / "new" / "plain.jsonl").ok()
    shutil.copytree(trained / "merged", tmp_path / "other")
    path = tmp_path / "other" / "generation_config.json"
    wishes = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "num_beams": 3, "top_k": 2, "do_sample": True}
    wishes["suppress_tokens"] = list(range(10, 250))
    path.write_text(json.dumps(json.loads(path.read_text()) | wishes))
    ask("--base_model", tmp_path / "other", *flags, "--predictions_file", tmp_path / "other.jsonl").ok()
    plain, other = ([row["Output"] for row in lines(tmp_path / name)] for name in ("new/plain.jsonl", "other.jsonl"))
    assert plain == other


def test_a_chat_has_history_that_can_be_cleared(trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is flu?\nAnd why?\n/quit\n/clear\nWhat is flu?\n/exit\n"))
    shown = ask("--base_model", trained / "merged", "--interactive", "--system", "Be brief.").ok().stdout
    first, second, third = [part.strip() for part in shown.split("Model: ")[1:]]
    assert first.split("You:")[0] == third.split("You:")[0] and "/quit is not a command" in second


def test_a_question_in_another_encoding_is_asked_for_again(trained, monkeypatch):
    heard = []

    def encode(self, tokenizer, messages):
        heard.append([turn["content"] for turn in messages if turn["role"] == "user"])
        return {"input_ids": [5]}

    monkeypatch.setattr("arguments.encoding.LengthArguments.encode_prompt", encode)
    typed = b"What is flu?\n" + "流感是什么？\n".encode("gb18030") + b"And why?\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
    shown = ask("--base_model", trained / "merged").ok().stdout
    assert shown.count("That was not UTF-8 text") == 1
    assert heard == [["What is flu?"], ["What is flu?", "And why?"]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--base_model is missing"),
        (("--compare", "a", "./a", "--data_file", "q"), "--compare a ./a names a model twice"),
        (("--compare", "a", "b", "--base_model", "c", "--web"), "--compare and --base_model"),
        (("--base_model", "a", "--interactive", "--data_file", "q"), "--interactive is a chat"),
        (("--base_model", "a", "--web", "--data_file", "q"), "--web is a chat"),
        (("--base_model", "a", "--predictions_file", "p"), "--predictions_file is for the answers"),
        (("--base_model", "a", "--system", "s", "--with_prompt", "False"), "--system is told by the chat template"),
        (("--base_model", "a", "--web", "--port", 65536), "--port is 65536, expected 1 to 65535"),
        (("--compare", "a", "b"), "--compare needs --data_file"),
        (("--compare", "a", "b", "--lora_model", "c", "--web"), "--lora_model goes with --base_model"),
        (("--base_model", "nowhere"), "nowhere is not a model"),
        (("--base_model", "a", "--max_new_tokens", 0), "--max_new_tokens is 0"),
        (("--base_model", "a", "--max_eval_samples", 0), "--max_eval_samples is 0"),
        (("--base_model", "a", "--seed", -1), "--seed is -1, expected 0 to 4294967295"),
        (("--base_model", "a", "--seed", 2**32), "--seed is 4294967296"),
        (("--base_model", "a", "--temperature", "nan"), "--temperature is nan"),
        (("--base_model", "a", "--data_file", "nowhere"), "no such folder of records: nowhere"),
        (("--base_model", "a", "--lora_modle", "b"), "did you mean --lora_model?"),
        (("--model_name_or_path", "a", "--finetuning_type", "lora"), "--help lists the flags"),  # not: give --use_peft
    ],
)
def test_errors(flags, message):
    ended = in_process("inference.py", *flags)
    assert ended.code == 2 and len(ended.errors) == 1 and message in ended.errors[0]


@pytest.mark.parametrize(
    ("names", "where", "message"),
    [
        (("--base_model", "{llama}"), "q.txt/x.jsonl", "q.txt/x.jsonl cannot be written"),
        (("--base_model", "{llama}"), "", "cannot be written"),
        (("--compare", "{llama}"), "q.txt/x.jsonl", "q.txt/x.jsonl cannot be written"),
        (("--compare", "{llama}", "nowhere"), "new/x.jsonl", "nowhere is not a model"),
    ],
)
def test_what_would_fail_behind_the_answers_fails_before_them(names, where, message, tiny, tmp_path):
    (tmp_path / "q.txt").write_text(QUESTIONS)
    names = [name.format(llama=tiny("llama")) for name in names]
    ended = ask(*names, "--data_file", tmp_path / "q.txt", "--predictions_file", tmp_path / where)
    assert ended.code == 2 and len(ended.errors) == 1 and message in ended.errors[0]
    assert "Answering" not in ended.stderr and [*tmp_path.iterdir()] == [tmp_path / "q.txt"]
