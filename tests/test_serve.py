"""A merged model behind `transformers serve`, asked with OpenAI's client (slow; where both are installed)."""

import os
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import in_process, merge, stage
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTION = [{"role": "user", "content": "What is flu?"}]


@pytest.mark.slow
def test_openai_client(tiny, records, tmp_path):
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi"), pytest.importorskip("uvicorn")
    in_process(*stage("sft", tiny("llama"), records, tmp_path / "sft")).ok()
    in_process(*merge(tiny("llama"), tmp_path / "sft", tmp_path / "merged")).ok()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "merged")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([*command, "--port", str(port)], env=environment, stderr=subprocess.DEVNULL)
    client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    asked = {"model": str(tmp_path / "merged"), "messages": QUESTION, "max_tokens": 6, "temperature": 0}
    try:
        for _ in range(240):
            try:
                answer = client.chat.completions.create(**asked).choices[0].message.content
                break
            except openai.APIConnectionError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        pieces = [
            piece.choices[0].delta.content or "" for piece in client.chat.completions.create(**asked, stream=True)
        ]
    finally:
        server.terminate()
        server.wait()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        found = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert answer == "".join(pieces) == tokenizer.decode(found, skip_special_tokens=True)
