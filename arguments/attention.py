"""Attention in blocks of rows on a CPU: PyTorch's kernel takes up to twice as long, with a mask up to seven times."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import library
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from arguments.precision import native_bf16

ROWS = 64  # whose scores are computed at once; 32 and 128 took as long or longer but in a few shapes, 16 longer
LOWEST = torch.finfo(torch.float32).min  # not -inf: a row that sees nothing, as padding may, is then no NaN


def by_group(heads, key):
    """[batch, heads, length, d] as [batch * groups, heads / groups, length, d], with the groups of `key`."""
    batch, count, length, size = heads.shape
    return heads.reshape(batch * key.shape[1], count // key.shape[1], length, size)


def transposed(columns):
    """[batch, length, d] as [batch, d, length], copied before it is turned if need be: bmm would copy it turned."""
    return columns.contiguous().transpose(1, 2)


@contextmanager
def bf16_units():
    """Inside, float32 products run in the CPU's bf16 units: factors rounded to bf16, sums and results float32."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def blocks(query, key, visible, scale: float) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Of `attend`'s arguments: some rows, the columns that they see, and their attention to these.

    That is softmax(scale * query key^T) in float32, [batch * groups, heads / groups * rows, columns].
    """
    (batch, groups), length = key.shape[:2], query.shape[2]
    queries, keys = by_group(query, key).float(), key.float().flatten(0, 1)
    units = bf16_units if query.dtype == key.dtype == torch.bfloat16 else nullcontext  # nothing is rounded then
    for start in range(0, length, ROWS):
        rows = slice(start, min(start + ROWS, length))
        if visible is None:
            columns, masked = slice(0, rows.stop), slice(start, rows.stop)
            hidden = torch.ones(rows.stop - start, rows.stop - start).triu(1)
        else:
            some = visible[:, 0, rows].flatten(0, 1).amax(0).nonzero()
            columns = slice(int(some[0]), int(some[-1]) + 1) if len(some) else slice(0, 1)
            masked, hidden = slice(None), (~visible[:, :, None, rows, columns]).float()
        with units():
            scores = torch.bmm(queries[:, :, rows].flatten(1, 2), transposed(keys[:, columns])).mul_(scale)
        of_heads = scores.view(batch, groups, -1, rows.stop - start, columns.stop - columns.start)
        of_heads[..., masked] += hidden.mul_(LOWEST)  # masked_fill_ takes longer than the product
        yield rows, columns, torch.softmax(scores, -1, out=scores)
        del scores, of_heads  # before the next ones are made


@library.custom_op("blockwise::attend", mutates_args=())
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """softmax(scale * query key^T) value: query [batch, heads, length, d], key and value [batch, groups, length, d].

    `visible` [batch or 1, 1, length, length] says which columns (keys) a row (query) sees; None: those up to its own.
    Scores and their softmax are in float32, the other products in the dtype of `value`, as in PyTorch's kernel, and as
    there the backward pass computes the scores again, so that no table of them is kept.
    Returns [batch, length, heads, d].

    An operator, not an autograd.Function: torch.compile calls it as it is, where it would trace the loop.
    """
    (batch, heads, length, _), groups, values = query.shape, key.shape[1], value.flatten(0, 1)
    out = values.new_empty(batch, length, groups, heads // groups, values.shape[-1])
    for rows, columns, attention in blocks(query, key, visible, scale):
        part = out[:, rows].movedim(1, 3)
        part.copy_(torch.bmm(attention.to(out.dtype), values[:, columns]).view(part.shape))
        del attention
    return out.flatten(2, 3)


@library.custom_op("blockwise::attend_backward", mutates_args=())
def attend_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value; with attention A: dA = dO value^T, of the scores A * (dA - sum(A * dA))."""
    queries, gradients = by_group(query, key), by_group(gradient.transpose(1, 2), key)
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    of_queries = queries.new_empty(queries.shape)
    of_keys, of_values = keys.new_zeros(keys.shape, dtype=torch.float32), values.new_zeros(values.shape).float()
    for rows, columns, attention in blocks(query, key, visible, scale):
        attention, part = attention.to(keys.dtype), gradients[:, :, rows].flatten(1, 2)
        of_values[:, columns] += torch.bmm(attention.transpose(1, 2), part)
        of_attention = torch.bmm(part, transposed(values[:, columns]))
        of_scores = torch._softmax_backward_data(of_attention, attention, -1, attention.dtype)
        of_queries[:, :, rows] = torch.bmm(of_scores, keys[:, columns]).view_as(of_queries[:, :, rows])
        of_keys[:, columns] += torch.bmm(of_scores.transpose(1, 2), queries[:, :, rows].flatten(1, 2))
        del attention, of_attention, of_scores
    made = (of_queries, query), (of_keys, key), (of_values, value)
    of_query, of_key, of_value = (part.to(whole.dtype).view(whole.shape) for part, whole in made)
    return of_query * scale, of_key * scale, of_value


@attend.register_fake
def _(query, key, value, visible, scale):
    batch, heads, length, _ = query.shape
    return value.new_empty(batch, length, heads, value.shape[-1])


@attend_backward.register_fake
def _(gradient, query, key, value, visible, scale):
    return tuple(part.new_empty(part.shape) for part in (query, key, value))


def setup_context(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx, gradient):
    return *attend_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None


attend.register_autograd(backward, setup_context=setup_context)
attend.register_autocast("cpu", torch.bfloat16)
attend_backward.register_autocast("cpu", torch.bfloat16)


def takes_blocks(module, query, key, attention_mask, is_causal=None, dropout=0.0, **settings) -> bool:
    """Whether a call of sdpa_attention_forward can go in blocks: causal, or with one mask for all heads."""
    if type(query) is not torch.Tensor or query.device.type != "cpu":
        return False  # shards, and stand-ins without storage, are other types
    if dropout or any(settings.get(name) is not None for name in ("position_bias", "softcap", "cache")):
        return False
    rows, columns = query.shape[2], key.shape[2]
    if rows == 1 or rows != columns:  # behind what a cache holds
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    longest = math.inf if attention_mask is not None else 8 * ROWS  # in float32: longer causal rows gain nothing
    if dtype != torch.bfloat16 and not (dtype == torch.float32 and 2 * ROWS <= rows <= longest):
        return False
    if attention_mask is None:
        return getattr(module, "is_causal", True) if is_causal is None else is_causal
    return attention_mask.dtype == torch.bool and attention_mask.shape[1:] == (1, rows, columns)


def blockwise_attention(module, query, key, value, attention_mask, scaling=None, **settings):
    """transformers' attention interface: in blocks if the call allows it, else by sdpa_attention_forward."""
    if not takes_blocks(module, query, key, attention_mask, **settings):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, scale), None


def attend_in_blocks() -> None:
    """Register blockwise_attention as "sdpa" from now on.

    Under that name, since models and libraries decide by it which masks they make and what they leave to a kernel.

    Without a mask transformers 5.23 leaves grouped heads to flash attention. GPUs before Ampere, such as a T4, have
    none, and PyTorch 2.13's other kernel wants as many heads of keys as of queries: it would compute the whole table
    of scores. So the heads are repeated there, as with a mask, or, for a single query, packed.
    """
    AttentionInterface.register("sdpa", blockwise_attention)
    if torch.cuda.is_available() and not native_bf16(gpu=True):
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False
