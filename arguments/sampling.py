"""Sampling answers, each a function of its own seed alone."""

import random
from contextlib import contextmanager
from itertools import groupby

import torch
from loguru import logger
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from arguments.model import alike


def uniforms(seeds: list[str], count: int) -> torch.Tensor:
    """Numbers [len(seeds), count] in [0, 1), each row a function of its seed alone."""
    generators = [random.Random(seed) for seed in seeds]
    return torch.tensor([[g.random() for _ in range(count)] for g in generators], dtype=torch.float64)


class InverseTransformSampling(LogitsProcessor):
    """Sampling with given uniform numbers [batch, tokens]: leaves one token possible, for greedy decoding to take.

    An answer then depends on its own numbers alone, not on its neighbours in the batch, on the rank, or on what was
    sampled before. Two CPU cores need 9 ms for 32 rows of 49,152 logits, torch.multinomial 32 ms.
    """

    def __init__(self, numbers: torch.Tensor, prompt_width: int, temperature: float):
        self.numbers, self.prompt_width, self.temperature = numbers, prompt_width, temperature

    def __call__(self, input_ids, scores):
        cumulative = (scores / self.temperature).softmax(-1).double().cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt_width, None]
        chosen = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
        chosen = chosen.clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class Tick(LogitsProcessor):
    """Advances a progress bar at each token; the scores stay as they are."""

    def __init__(self, bar: tqdm):
        self.bar = bar

    def __call__(self, input_ids, scores):
        self.bar.update()
        return scores


@contextmanager
def decoding(model, config: GenerationConfig):
    """Inside, the model generates as `config` says, without its own penalties and the like."""
    kept, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = kept


def until_eos(ids: list[int], eos_ids: list[int]) -> list[int]:
    end = next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids))
    return ids[:end]


def takes_padding(model, tokenizer, prompts: list[list[int]]) -> bool:
    """Whether the answers to `prompts`, of different lengths, are the same behind padding.

    The model is tested on four of them, up to the second token of an answer, in which the cache has a part: in
    transformers 5.23 RecurrentGemma reads padding as if it were tokens, and MiniMax sees some of it from the second
    token on. Real prompts, as in bfloat16 rounding alone moves SmolLM2's logits by 1 to 4% after a text (in float32 by
    0.0002%), and by up to 500% after tokens that no text has in a row.
    """
    by_length = sorted(prompts, key=len)
    tested, longest = [by_length[len(prompts) * i // 4] for i in range(4)], by_length[-1]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=2,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id,
    )

    def answers(rows, first=None):
        """The first tokens of the answers, or those of `first`, and the logits of the second."""
        padded = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
        made = model.generate(**padded, prefix_allowed_tokens_fn=first and (lambda row, _: first[row]))
        return made.sequences[:, -2:-1].tolist(), made.logits[1]

    with decoding(model, config):
        alone = [answers([prompt]) for prompt in tested]
        first = [tokens[0] for tokens, _ in alone]
        _, together = answers([*tested, longest], [*first, first[0]])
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(model.device.type)
    same = alike(together[:-1], torch.cat([logits for _, logits in alone]), within=1e-3 if exact else 0.1)
    if not same:
        logger.warning(
            "This model answers otherwise behind padding: prompts of different lengths are not put together"
        )
    return same


def chunks(prompts: list[list[int]], rows: int, padding: bool) -> list[list[int]]:
    """Indices of the prompts to sample at once: up to `rows` of similar length; of the same, if not `padding`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order] if padding else [list(same) for _, same in groupby(order, key=lambda i: len(prompts[i]))]
    return [group[start : start + rows] for group in groups for start in range(0, len(group), rows)]


def sample_answers(
    model,
    tokenizer,
    prompts: list[list[int]],
    numbers: torch.Tensor,
    config: GenerationConfig,
    temperature: float,
    together: list[list[int]],
    bar: tqdm,
) -> list[list[int]]:
    """One answer per prompt, up to and with its eos, drawn by `numbers` [prompts, config.max_new_tokens].

    `together` holds `chunks`, each sampled at once. `config` decodes greedily and lists the eos ids; it replaces
    the model's own, which may ask for top-k or penalties.
    """
    answers = {}
    for number, chunk in enumerate(together, 1):
        padded = tokenizer.pad({"input_ids": [prompts[i] for i in chunk]}, padding_side="left", return_tensors="pt")
        width = padded["input_ids"].shape[1]
        processors = LogitsProcessorList([InverseTransformSampling(numbers[chunk], width, temperature), Tick(bar)])
        with decoding(model, config):
            sampled = model.generate(**padded.to(numbers.device), logits_processor=processors)[:, width:].tolist()
        bar.update(number * config.max_new_tokens - bar.n)  # all may have ended before the last token
        answers |= {i: until_eos(ids, config.eos_token_id) for i, ids in zip(chunk, sampled, strict=True)}
    return [answers[i] for i in range(len(prompts))]
