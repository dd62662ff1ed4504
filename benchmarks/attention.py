"""Attention on this CPU, PyTorch's kernel and in blocks: milliseconds forward and backward, in turn.

    python benchmarks/attention.py --heads 9 --groups 3 --size 64 --dtype float32

Prints one markdown table. A mask of documents lets 85 tokens see each other, as packed conversations have it.
"""

import argparse
import statistics
import sys
import time
from types import SimpleNamespace

import torch
from measure import ROOT, machine
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SHAPES = [(4, 100), (4, 512), (2, 1024), (1, 4096)]  # rows, tokens of each


def milliseconds(attention, inputs: list, mask) -> tuple[float, float]:
    """Of one call on [query, key, value, gradient] and its backward pass."""
    query, key, value, gradient = inputs
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    started = time.perf_counter()
    out = attention(module, query, key, value, mask)[0]
    between = time.perf_counter()
    torch.autograd.grad(out, (query, key, value), gradient)
    return 1e3 * (between - started), 1e3 * (time.perf_counter() - between)


def cell(ways, rows: int, tokens: int, args, mask) -> str:
    heads = args.heads, args.groups, args.groups
    dtype = getattr(torch, args.dtype)
    inputs = [torch.randn(rows, tokens, n, args.size, dtype=dtype).transpose(1, 2) for n in heads]
    inputs = [*(part.requires_grad_() for part in inputs), torch.randn(rows, tokens, args.heads, args.size).to(dtype)]
    found = [[milliseconds(way, inputs, mask) for way in ways] for _ in range(args.repeats + 1)][1:]
    medians = [
        [statistics.median(times) for times in zip(*of_way, strict=True)] for of_way in zip(*found, strict=True)
    ]
    return "; ".join(f"{forward:.1f}, {backward:.1f}" for forward, backward in medians)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"heads": 9, "groups": 3, "size": 64, "repeats": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from arguments.attention import blockwise_attention

    ways = sdpa_attention_forward, blockwise_attention
    torch.manual_seed(0)
    print(f"{machine()}, {args.dtype}\n\n| | causal | a mask of documents of 85 tokens |\n|---|---|---|")
    for rows, tokens in SHAPES:
        document = torch.arange(tokens) // 85
        mask = (document[:, None] == document).tril()[None, None].expand(rows, 1, tokens, tokens)
        cells = [cell(ways, rows, tokens, args, one) for one in (None, mask)]
        print(f"| {rows} x {tokens:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
