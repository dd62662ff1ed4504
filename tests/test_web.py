"""inference.py --web: what a question and a vote do; the page itself, by its API and in Chromium, if there is one."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import pytest
from conftest import ROOT, in_process, merge, stage

from arguments.web import ask_all, vote
from inference import Answerer, InferenceArguments

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def models(tiny, records, tmp_path_factory):
    """A base model and what SFT made of it."""
    folder = tmp_path_factory.mktemp("web")
    in_process(*stage("sft", tiny("llama"), records, folder / "sft", "--learning_rate", "0.1")).ok()
    in_process(*merge(tiny("llama"), folder / "sft", folder / "merged")).ok()
    return [str(tiny("llama")), str(folder / "merged")]


def test_answers_come_piece_by_piece(models):
    args = InferenceArguments(compare=models, web=True, max_new_tokens=6, dtype="float32")
    answerers = [Answerer(name, args) for name in models]
    shown = list(ask_all("What is flu?", [[], []], answerers))
    question = {"role": "user", "content": "What is flu?"}
    assert shown[0] == [[question], [question]], "the question shows before any answer"
    assert len(shown) > 4 and all(len(first) >= len(second) for first, second in shown), "one model after another"
    for messages, answerer in zip(shown[-1], answerers, strict=True):
        assert messages == [question, {"role": "assistant", "content": answerer.answer([[question]])[0][0]}]
    followed = list(ask_all("And why?", shown[-1], answerers))[-1]
    assert [len(messages) for messages in followed] == [4, 4] and len(shown[-1][0]) == 2


def test_a_model_that_fails_is_heard(models, monkeypatch):
    answerer = Answerer(models[0], InferenceArguments(base_model=models[0], web=True))
    monkeypatch.setattr(answerer.model, "generate", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(answerer.stream([{"role": "user", "content": "What is flu?"}]))


def test_votes_are_pairs_that_stage_3_reads(models, records, tmp_path):
    prompt = [{"role": "system", "content": "简短回答。"}, {"role": "user", "content": "流感是什么？"}]

    def said(text, prompt=prompt):
        return [*prompt, {"role": "assistant", "content": text}]

    path = tmp_path / "votes" / "votes.jsonl"
    histories = [said("不知道。"), said("一种病毒感染。"), said("不知道。"), said("其他。", prompt[1:])]
    assert vote(path, histories, best=1) == 1, "equal answers count once, answers to something else not at all"
    assert vote(path, [said("好。"), said("好。")], best=0) == 0
    assert vote(path, [said("一种病毒感染，多喝水。"), said("不知道。")], best=0) == 1
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert rows[0] == {"prompt": prompt, "chosen": "一种病毒感染。", "rejected": "不知道。"} and len(rows) == 2
    command = stage("rm", models[0], records, tmp_path / "rm", "--train_file_dir", path.parent)
    in_process(*command).ok()


def test_web_without_gradio_says_what_to_install(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    ended = in_process("inference.py", "--base_model", models[0], "--web")
    assert ended.code == 2 and "--web needs gradio: pip install gradio" in ended.errors[0]


def test_a_port_that_is_taken_is_said_before_models_load(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = in_process("inference.py", "--base_model", models[0], "--web", "--port", port)
    assert ended.code == 2 and f"--port {port} is not available" in ended.errors[0] and "Loaded" not in ended.stderr


@pytest.fixture
def page(models, tmp_path):
    """The address of a running page."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--compare", *models, "--web", "--port", str(port), "--max_new_tokens", "6", "--votes_file")
    command = [sys.executable, "inference.py", *flags, str(tmp_path / "votes.jsonl")]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(address)
            break
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.5)
    yield address
    server.terminate()
    server.wait()


@pytest.mark.slow
def test_the_page_asked_by_gradios_client(page, tmp_path):
    """What a browser would send: a question, whose answers stream, and a vote."""
    from gradio_client import Client

    client = Client(page, verbose=False, download_files=False)
    shown = list(client.submit("高血压要注意什么？", api_name="/ask"))
    assert len(shown) > 4 and shown[0][0] == "", "the question's box is emptied, then answers come piece by piece"
    answers = [column[-1]["content"][0]["text"] for column in shown[-1][1:]]
    client.predict(api_name="/lambda_1")
    (row,) = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text("utf-8").splitlines()]
    assert [row["rejected"], row["chosen"]] == answers
    assert row["prompt"] == [{"role": "user", "content": "高血压要注意什么？"}]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_page_in_a_browser(page, models, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        view, heard, asked = browser.new_page(), [], []
        view.on("console", lambda message: heard.append(message.text) if message.type == "error" else None)
        view.on("request", lambda request: asked.append(request.url))
        view.goto(page)
        box = view.locator("textarea").first
        box.fill("高血压要注意什么？")
        box.press("Enter")
        name = models[1].rpartition("/")[2]
        view.wait_for_function("document.querySelectorAll('.bot.message').length == 2", timeout=60_000)
        view.wait_for_timeout(2000)
        view.get_by_role("button", name=f"{name} is best").click()
        view.get_by_text("all go on from the answer that won").wait_for()
        answers = [answer.inner_text() for answer in view.locator(".bot.message").all()]
        browser.close()
    assert heard == [] and all(url.startswith((page, "data:", "blob:")) for url in asked), "errors, or a network"
    assert len(set(answers)) == 1
    (row,) = [json.loads(line) for line in (tmp_path / "votes.jsonl").read_text("utf-8").splitlines()]
    assert row["prompt"] == [{"role": "user", "content": "高血压要注意什么？"}]
