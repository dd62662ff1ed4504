"""Sampling rollouts on a vLLM server, through its HTTP interface alone: nothing of vLLM is imported."""

import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
import torch

from arguments.command_line import Fault, UserError

SECONDS = 10, 3600  # to connect; to answer, as a rollout may take long
AT_ONCE = 256  # requests; the server makes batches of them
LARGEST_DIFFERENCE = 0.3  # nats a token: 16 bits leave 0.01 to 0.05, a 4-bit base here some 0.1


class RolloutServer:
    """A `vllm serve` of the policy's base, which reads the policy's adapter from a folder that both machines see.

    It must allow adapters to come and go, and report the log-probabilities of what it really sampled from:

        VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve outputs/sft-merged --enable-lora --max-lora-rank 8 \
            --logprobs-mode processed_logprobs

    An adapter is a hundredth of a model, so it needs no NCCL group and no merge, as sending all weights would.
    Endpoints: https://docs.vllm.ai/en/latest/features/lora/ and, for /v1/completions with tokens in and out, the
    client that trl 1.x has for the same server.

    Args:
        url: where it listens, e.g. http://localhost:8000.
        folder: for the adapter while the server needs it; everything else in it is deleted.

    Raises:
        UserError: when nothing answers there.
    """

    def __init__(self, url: str, folder: Path):
        self.url, self.folder = url.rstrip("/"), folder.resolve()
        try:
            served = self.ask("/v1/models")["data"][0]
            self.base, self.room = served["id"], served.get("max_model_len")
        except Fault as error:
            raise UserError(f"--vllm_server {url}: {error}") from error
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"--vllm_server {url}: what answers there names no model, as vLLM does") from error
        self.policy = self.base  # until an adapter is loaded

    def ask(self, path: str, **payload) -> dict:
        method = "POST" if payload else "GET"
        try:
            answer = requests.request(method, self.url + path, json=payload or None, timeout=SECONDS)
        except requests.RequestException as error:
            raise Fault(f"the vLLM server {self.url} does not answer ({type(error).__name__})") from error
        if not answer.ok:
            raise Fault(f"the vLLM server answers {answer.status_code} to {path}: {answer.text[:500]}")
        return answer.json() if "json" in answer.headers.get("content-type", "") else {}

    def load(self, model) -> None:
        """Let the server sample with the adapter "default" of a PeftModel, and forget the previous one."""
        name = f"policy-{uuid.uuid4().hex}"  # unused by any run: a server keeps what a killed one loaded
        model.save_pretrained(self.folder / name, selected_adapters=["default"])
        self.ask("/v1/load_lora_adapter", lora_name=name, lora_path=str(self.folder / name))
        loaded = {served["id"] for served in self.ask("/v1/models")["data"]}
        for old in set(self.folder.iterdir()) - {self.folder / name}:  # the last rollout's, or a killed run's
            if old.name in loaded:
                self.ask("/v1/unload_lora_adapter", lora_name=old.name)
            shutil.rmtree(old)
        self.policy = name

    def close(self) -> None:
        """Remove the adapter from the server, and its files."""
        if self.policy != self.base:
            self.ask("/v1/unload_lora_adapter", lora_name=self.policy)
            shutil.rmtree(self.folder)
            self.policy = self.base

    def sample(self, model: str, prompts: list[list[int]], seeds: list[int], **limits) -> list[dict]:
        """One answer per prompt: {"ids"} up to and with its end, {"sampler_logp"} [ids] as the server computed them.

        Plain sampling, whatever the model's generation_config asks for.

        Raises:
            Fault: when prompt and answer might not fit: the server would cut the answer, without a word.
        """
        needed = max(map(len, prompts), default=0) + limits["max_tokens"]
        if self.room and needed > self.room:
            raise Fault(
                f"the vLLM server takes {self.room} tokens, a prompt with its answer may have {needed}: start it with "
                f"--max-model-len {needed} or more"
            )
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0}

        def answer(prompt: list[int], seed: int) -> dict:
            asked = {"model": model, "prompt": prompt, "seed": seed, "return_token_ids": True}
            (choice,) = self.ask("/v1/completions", **asked, **plain, **limits)["choices"]
            return {"ids": choice["token_ids"], "sampler_logp": torch.tensor(choice["logprobs"]["token_logprobs"])}

        with ThreadPoolExecutor(AT_ONCE) as executor:
            return list(executor.map(answer, prompts, seeds))


def sampler_difference(answers: list[dict], first: int) -> float:
    """Mean over the tokens of |log-probability here - log-probability on the server|, in nats; 0 without a token.

    Those before number `first` are left out: the server's are of what it may sample, which does not end there.

    Raises:
        Fault: when it is no rounding: the server has another model, or another adapter.
    """
    pairs = [(answer["logp"][first:], answer["sampler_logp"][first:]) for answer in answers]
    differences = torch.cat([(here - there).abs() for here, there in pairs])
    difference = differences.mean().item() if len(differences) else 0.0
    if not difference <= LARGEST_DIFFERENCE:
        raise Fault(
            f"the vLLM server samples from another model: its log-probabilities are off by {difference:.2g} nats a "
            "token. Start it on the base that the policy's adapter has, with --logprobs-mode processed_logprobs"
        )
    return difference
