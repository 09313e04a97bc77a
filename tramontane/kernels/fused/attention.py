"""Causal attention in blocks of queries, so that scores stay in the cache.

Shapes as in `reference.py`; R = H / G heads read one kv head, n queries and m keys make a block.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tramontane.kernels.reference import split_pages

QUERY_BLOCK = 256  # queries per block: its scores stay in the L2 cache
KEY_STEP = 64  # the first key of a block is a multiple of this


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
    """See `reference.causal_attention`."""
    blocks = plan_attention((q.shape[0],), k.shape[1] - q.shape[0], window, q.dtype, q.device)
    return _BlockAttention.apply(q, k, v, blocks)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], *, window: int | None = None
) -> Tensor:
    """See `reference.packed_attention`."""
    assert sum(seqlens) == len(q) == k.shape[1], (seqlens, q.shape, k.shape)
    blocks = plan_attention(tuple(seqlens), 0, window, q.dtype, q.device)
    return _BlockAttention.apply(q, k, v, blocks)


def paged_attention(
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    num_queries: Tensor,
    num_keys: Tensor,
    *,
    window: int | None = None,
) -> Tensor:
    """See `reference.paged_attention`."""
    parts = split_pages(q, key_pool, value_pool, block_tables, num_queries, num_keys, window=window)
    return torch.cat([causal_attention(*part, window=window) for part in parts])


class AttentionBlock(NamedTuple):
    """Some query rows and the keys that any of them sees.

    `bias` (n, m - first_biased) is added to the scores of the last keys: -inf hides a key.
    """

    rows: slice
    keys: slice
    first_biased: int
    bias: Tensor


@lru_cache(maxsize=8)  # the layers of one forward pass share a plan
def plan_attention(
    seqlens: tuple[int, ...],
    num_cached: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> list[AttentionBlock]:
    """Cut attention into blocks of queries, so that no work is done far above the diagonal.

    `num_cached` keys precede the first query. Sequences (300, 212) with blocks of 256 give: rows
    0:256 with keys 0:256, rows 256:512 with keys 0:512 (row 256 belongs to the first sequence).
    The first key is rounded down, so that few shapes occur: oneDNN compiles a kernel for each.
    """
    lengths = torch.tensor(seqlens, device=device)
    start_of = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)  # (T,)
    position = torch.arange(len(start_of), device=device) + num_cached
    oldest = start_of if window is None else torch.maximum(start_of, position - window + 1)
    key_at = torch.arange(num_cached + len(start_of), device=device)
    first_keys = oldest[::QUERY_BLOCK].tolist()
    blocks = []
    for start, first_key in zip(range(0, len(start_of), QUERY_BLOCK), first_keys, strict=True):
        rows = slice(start, min(start + QUERY_BLOCK, len(start_of)))
        keys = slice(first_key // KEY_STEP * KEY_STEP, num_cached + rows.stop)
        hidden = key_at[keys] > position[rows, None]
        hidden |= key_at[keys] < oldest[rows, None]
        blocks.append(_bias_hidden_keys(rows, keys, hidden, dtype=dtype))
    return blocks


def _bias_hidden_keys(
    rows: slice, keys: slice, hidden: Tensor, *, dtype: torch.dtype
) -> AttentionBlock:
    """Most blocks hide keys in their last columns alone, above the diagonal."""
    columns = hidden.any(0).nonzero()
    first = int(columns[0]) if len(columns) else hidden.shape[1]
    bias = torch.zeros(hidden[:, first:].shape, dtype=dtype, device=hidden.device)
    return AttentionBlock(rows, keys, first, bias.masked_fill_(hidden[:, first:], float("-inf")))


class _BlockAttention(torch.autograd.Function):
    """Softmax attention block by block; probabilities are kept for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[AttentionBlock]
    ) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        grouped = _group_queries(q * q.shape[-1] ** -0.5, k.shape[0])  # (G, R, T, S)
        out = torch.empty_like(grouped)
        kept = []
        for rows, keys, first_biased, bias in blocks:
            queries = grouped[:, :, rows].flatten(1, 2)  # (G, R*n, S)
            scores = torch.bmm(queries, k[:, keys].transpose(1, 2))  # (G, R*n, m)
            scores.unflatten(1, (-1, len(bias)))[..., first_biased:].add_(bias)
            probs = torch.softmax(scores, dim=-1)
            out[:, :, rows] = torch.bmm(probs, v[:, keys]).view_as(out[:, :, rows])
            if needs_grad:
                kept.append(probs)
        if needs_grad:
            ctx.blocks = blocks
            ctx.save_for_backward(grouped, k, v, *kept)
        return _ungroup_queries(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        grouped, k, v, *kept = ctx.saved_tensors
        grad = _group_queries(grad, k.shape[0])  # (G, R, T, S)
        grad_q, grad_k, grad_v = torch.empty_like(grouped), torch.zeros_like(k), torch.zeros_like(v)
        for (rows, keys, *_), probs in zip(ctx.blocks, kept, strict=True):
            grad_out = grad[:, :, rows].flatten(1, 2)  # (G, R*n, S)
            grad_v[:, keys] += torch.bmm(probs.transpose(1, 2), grad_out)
            grad_probs = torch.bmm(grad_out, v[:, keys].transpose(1, 2))  # (G, R*n, m)
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            block = grad_q[:, :, rows]
            grad_q[:, :, rows] = torch.bmm(grad_scores, k[:, keys]).view_as(block)
            queries = grouped[:, :, rows].flatten(1, 2)
            grad_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), queries)
        return _ungroup_queries(grad_q) * grouped.shape[-1] ** -0.5, grad_k, grad_v, None


def _group_queries(q: Tensor, num_kv_heads: int) -> Tensor:
    """(T, H, S) -> (G, R, T, S): the R heads that read one kv head lie together."""
    return q.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).contiguous()


def _ungroup_queries(q: Tensor) -> Tensor:
    """(G, R, T, S) -> (T, H, S), contiguous."""
    return q.permute(2, 0, 1, 3).flatten(1, 2)
