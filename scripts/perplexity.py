"""Perplexity of texts that have nothing to do with the domain, under several models: what training made them forget.

    python scripts/perplexity.py data/general models/SmolLM2-135M-Instruct outputs/pt-merged outputs/sft-merged

Reads a folder of documents, in any of the forms of data/README.md, and the models; prints one JSON object
{model: {"perplexity", "tokens"}}: exp of the mean loss per token. Each text is read by itself, after a
beginning-of-text token if the tokenizer adds one, up to 2,048 tokens or as many as the model has positions.
"""

import json
import math
import sys
from pathlib import Path

import torch
from loguru import logger
from tqdm import tqdm
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arguments.command_line import UserError, run_stage  # noqa: E402
from arguments.data import DataArguments  # noqa: E402
from arguments.model import ModelArguments, check_finite  # noqa: E402
from arguments.precision import best_precision  # noqa: E402

LONGEST = 2048  # tokens of a text, whose logits are in memory at once


def load_judged(path: str) -> tuple:
    """A model, on the GPU if there is one and in the precision that suits, and its tokenizer."""
    model_args = ModelArguments(path)
    model_args.resolve_dtype(best_precision(), trains_all=False)
    tokenizer, model = model_args.load_tokenizer(), model_args.load_model(AutoModelForCausalLM).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    check_finite(model, tokenizer, "CUDA_VISIBLE_DEVICES= computes on the CPU")
    return model, tokenizer


def folder_and_models() -> tuple[str, list[str]]:
    """The folder and the models of the command line; a wrong name fails now, not after the models before it."""
    folder, *models = sys.argv[1:] or [""]
    if not models:
        raise UserError(f"expected a folder and models: python {sys.argv[0]} FOLDER MODEL ...")
    for name in models:
        ModelArguments(name).load_config()
    return folder, models


@torch.no_grad()
def perplexity(path: str, texts: list[str]) -> dict:
    """exp of the summed loss over the number of tokens that have one before them."""
    model, tokenizer = load_judged(path)
    longest = min(ModelArguments(path).positions() or LONGEST, LONGEST)
    total, tokens = 0.0, 0
    for text in tqdm(texts, f"Perplexity of general text, {path}"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :longest].to(model.device)
        if ids.shape[1] < 2:
            continue
        logits = model(ids[:, :-1]).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    if not tokens:
        raise UserError("no text has two tokens, the second of which could be predicted")
    return {"perplexity": math.exp(total / tokens), "tokens": tokens}


def main():
    logger.remove()  # lines of arguments would stand between those that are printed
    folder, models = folder_and_models()
    texts = DataArguments(folder).load_texts()
    print(json.dumps({path: perplexity(path, texts) for path in models}, indent=1))


if __name__ == "__main__":
    run_stage(main)
