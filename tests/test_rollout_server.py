"""Rollouts from a vLLM server: a stand-in that speaks its HTTP protocol, and vLLM itself where VLLM names its command.

VLLM=/path/to/vllm pytest tests/test_rollout_server.py -m "", a CPU's vLLM in an environment of its own (docs/rl.md).
"""

import json
import os
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import torch
from conftest import ADAPTER, history, in_process, stage
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arguments.command_line import Fault
from arguments.rollout_server import sampler_difference
from arguments.sampling import uniforms

REWARD = ("--reward_functions", f"{__file__}:longer", "--max_steps", 3, "--precision", "fp32")


def longer(completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


class StandIn(ThreadingHTTPServer):
    """The endpoints that a run uses, as vLLM documents them: models, adapters that come and go, completions in tokens.

    It samples one token at a time with the whole sequence through the model: slow, and nothing of it is ours.
    """

    def __init__(self, base: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.base, self.loaded, self.asked, self.lock = base, {}, [], threading.Lock()
        self.models = {base: AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
        self.answers_before_it_fails, self.room = None, 4096

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def load(self, lora_name: str, lora_path: str) -> None:
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        self.models[lora_name] = PeftModel.from_pretrained(base, lora_path).eval()
        self.loaded[lora_name] = load_file(Path(lora_path) / ADAPTER)

    @torch.no_grad()
    def complete(self, model, prompt, seed, max_tokens, min_tokens, temperature, stop_token_ids, **plain) -> dict:
        assert (plain["top_p"], plain["top_k"], plain["min_p"], plain["repetition_penalty"]) == (1.0, 0, 0.0, 1.0)
        assert plain["return_token_ids"] is True and min_tokens == 1
        ids, logps = [], []
        for number in uniforms([str(seed)], max_tokens)[0]:
            logits = self.models[model](input_ids=torch.tensor([prompt + ids])).logits[0, -1] / temperature
            chances = logits.double().softmax(-1)
            ids.append(min(int((chances.cumsum(-1) < number).sum()), len(chances) - 1))
            logps.append(logits.log_softmax(-1)[ids[-1]].item())
            if ids[-1] in stop_token_ids:
                break
        return {"index": 0, "text": "", "token_ids": ids, "logprobs": {"token_logprobs": logps}}


class Handler(BaseHTTPRequestHandler):
    def answer(self, code: int, body: dict | str) -> None:
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(body, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        assert self.path == "/v1/models"
        base = {"id": self.server.base, "max_model_len": self.server.room}
        self.answer(200, {"data": [base, *({"id": name} for name in self.server.loaded)]})

    def do_POST(self):
        server, asked = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, asked))
            if self.path == "/v1/load_lora_adapter":
                server.load(**asked)
                return self.answer(200, f"Success: LoRA adapter '{asked['lora_name']}' added successfully.")
            if self.path == "/v1/unload_lora_adapter":
                del server.models[asked["lora_name"]]
                return self.answer(200, "removed")
            done = sum(path == "/v1/completions" for path, _ in server.asked)
            if server.answers_before_it_fails is not None and done > server.answers_before_it_fails:
                return self.answer(500, {"error": {"message": "out of memory"}})
            self.answer(200, {"choices": [server.complete(**asked)]})

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tiny):
    stand_in = StandIn(tiny("llama"))
    threading.Thread(target=stand_in.serve_forever, daemon=True).start()
    yield stand_in
    stand_in.shutdown()
    stand_in.server_close()


def test_the_server_samples_with_the_policy_of_each_rollout(server, tiny, records, tmp_path):
    def run(name):
        flags = ("--vllm_server", server.url, *REWARD, "--temperature", 0.8)
        in_process(*stage("rl", tiny("llama"), records, tmp_path / name, *flags)).ok()
        return load_file(tmp_path / name / ADAPTER)

    first, second = run("first"), run("second")
    assert all(torch.equal(first[name], second[name]) for name in first), "seeds do not decide"
    # the same log-probabilities on both sides, of every rollout: what the server had was what this policy was then
    assert max(history(tmp_path / "first", "sampler_difference")) < 1e-5
    assert history(tmp_path / "first", "kl")[0] == 0.0 != history(tmp_path / "first", "kl")[-1]
    last = list(server.loaded.values())[-1]
    assert all(torch.equal(last[name], first[name]) for name in first), "held-out answers are those of the end"
    used = {asked["model"] for path, asked in server.asked if path == "/v1/completions"}
    assert used == {server.base, *server.loaded}, "the reference answers too"
    assert set(server.models) == {server.base}, "an adapter stayed on the server"
    assert not (tmp_path / "first" / "vllm").exists()
    # each answer has its own seed, and a prompt of the same rollout never shares one
    seeds = [asked["seed"] for path, asked in server.asked if path == "/v1/completions" and "seed" in asked]
    assert len(set(seeds[:4])) == 4


def test_a_server_of_another_model(server, tiny, records, tmp_path):
    """It would sample from another distribution than the one that is trained, and nobody would see it."""
    state = server.models[server.base].state_dict()
    server.load = lambda lora_name, lora_path: server.models.__setitem__(lora_name, server.models[server.base])
    state["lm_head.weight"].mul_(-5.0)
    flags = ("--vllm_server", server.url, *REWARD, "--do_eval", False)
    outcome = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    assert outcome.code == 1 and "samples from another model" in outcome.errors[0]


def test_a_server_that_fails(server, tiny, records, tmp_path):
    """The run ends with what the server said, its checkpoint stays, and it goes on when the server is back."""
    server.answers_before_it_fails = 6  # in the second rollout
    flags = ("--vllm_server", server.url, *REWARD, "--save_steps", 1, "--do_eval", False)
    outcome = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
    assert outcome.code == 1 and "answers 500 to /v1/completions" in outcome.errors[0]
    assert "out of memory" in outcome.errors[0]
    assert len(server.loaded) == 2 and len(server.models) == 2, "the first rollout's adapter stayed"
    server.answers_before_it_fails = None
    in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *flags)).ok()
    assert set(server.models) == {server.base}, "the adapter of the run that failed stayed"
    assert len(history(tmp_path / "rl", "sampler_difference")) == 3


def test_a_server_without_room_for_the_answers(server, tiny, records, tmp_path):
    """vLLM would end them early, and PPO would take them for answers without an end."""
    server.room = 12
    outcome = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", "--vllm_server", server.url, *REWARD))
    assert outcome.code == 1 and "takes 12 tokens" in outcome.errors[0] and "--max-model-len" in outcome.errors[0]
    assert not any(path == "/v1/completions" for path, _ in server.asked)


def test_tokens_that_cannot_end_are_not_compared():
    """There the server's log-probabilities are of all tokens but the end: ln(1 / 0.9) = 0.105 higher, say."""
    answers = [
        {"logp": torch.tensor([-1.0, -2.0, -3.0]), "sampler_logp": torch.tensor([-0.895, -2.01, -3.03])},
        {"logp": torch.tensor([-1.0]), "sampler_logp": torch.tensor([-0.895])},
    ]
    assert sampler_difference(answers, 1) == pytest.approx(0.02)
    assert sampler_difference(answers, 0) == pytest.approx((0.105 + 0.01 + 0.03 + 0.105) / 4)
    assert sampler_difference(answers, 3) == 0.0
    with pytest.raises(Fault, match="another model"):
        sampler_difference([{"logp": torch.tensor([-1.0, -2.0]), "sampler_logp": torch.tensor([-1.0, -2.4])}], 1)


@pytest.mark.slow
def test_vllm_itself(default_model, records, tmp_path):
    """In float32 its log-probabilities are those computed here, also when the policy has moved."""
    if not os.environ.get("VLLM"):
        pytest.skip("VLLM names no vllm command")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ["VLLM"], "serve", default_model, "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "512", "--enable-lora", "--max-lora-rank", "8"]
    command += ["--logprobs-mode", "processed_logprobs"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with open(tmp_path / "vllm.log", "w") as log:
        vllm = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
    try:
        while True:
            try:
                requests.get(f"{url}/health", timeout=5).raise_for_status()
                break
            except requests.RequestException:
                assert vllm.poll() is None and time.monotonic() < deadline, (tmp_path / "vllm.log").read_text()[-3000:]
                time.sleep(1)
        flags = ("--vllm_server", url, *REWARD, "--temperature", 0.8, "--min_target_length", 2)
        in_process(*stage("rl", default_model, records, tmp_path / "rl", *flags)).ok()
        left = requests.get(f"{url}/v1/models", timeout=5).json()["data"]
    finally:
        vllm.terminate()
        vllm.wait()
    assert max(history(tmp_path / "rl", "sampler_difference")) < 1e-4
    assert history(tmp_path / "rl", "kl")[-1] != 0.0
    assert [model["id"] for model in left] == [default_model], "an adapter stayed on the server"


class Other(BaseHTTPRequestHandler):
    """A server, but not vLLM's: it answers everything with a page."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html></html>")

    def log_message(self, *args):
        pass


def test_another_server_is_refused(tiny, records, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever).start()
        flags = ("--vllm_server", f"http://127.0.0.1:{other.server_port}", *REWARD)
        outcome = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *flags))
        other.shutdown()
    assert outcome.code == 2 and "names no model" in outcome.errors[0] and not (tmp_path / "rl").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--vllm_server", "http://127.0.0.1:9"), "does not answer"),
        (("--vllm_server", "x", "--use_peft", False), "takes the policy as an adapter"),
    ],
)
def test_refused_before_weights_load(flags, said, tiny, records, tmp_path):
    outcome = in_process(*stage("rl", tiny("llama"), records, tmp_path / "rl", *flags, *REWARD))
    assert outcome.code == 2 and said in outcome.errors[0] and "--vllm_server" in outcome.errors[0]
    assert not (tmp_path / "rl").exists()
