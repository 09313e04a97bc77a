"""The kernels of `reference` with hand-written backward passes, for training and prefill in torch.

Each equals its namesake in `reference.py`. They are faster because intermediate results are few,
stay in the cache (attention and head work block by block), and are not copied back to slot order
where a gather does. Shapes as in `reference.py`; N = T * K routed token copies, sorted by expert.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 256  # queries per attention block: scores of one block stay in the L2 cache
KEY_STEP = 64  # the first key of a block is a multiple of this
MIN_PADDED_ROWS = 64  # experts with fewer rows are not padded
HEAD_BLOCK = 1024  # tokens per block of the head: 1024 x vocabulary logits


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return _RMSNorm.apply(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotate`."""
    return _Rotate.apply(x, cos, sin)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
    """See `reference.causal_attention`."""
    blocks = plan_attention((q.shape[0],), k.shape[1] - q.shape[0], window, q.dtype, q.device)
    return _BlockAttention.apply(q, k, v, blocks)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], *, window: int | None = None
) -> Tensor:
    """See `reference.packed_attention`."""
    blocks = plan_attention(tuple(seqlens), 0, window, q.dtype, q.device)
    return _BlockAttention.apply(q, k, v, blocks)


def moe_experts(
    x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> Tensor:
    """See `reference.moe_experts`."""
    return _MoeExperts.apply(x, weights, experts, w1, w2, w3)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """See `reference.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(hidden, weight, targets)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_float = x.float()
        inverse_rms = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)
        normed = (x_float * inverse_rms).to(x.dtype)
        ctx.save_for_backward(normed, inverse_rms, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, inverse_rms, weight = ctx.saved_tensors
        grad_weight = (grad * normed).flatten(0, -2).sum(0)  # in fp32 inside
        grad_normed = (grad * weight).float()
        mean = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = torch.addcmul(grad_normed, normed.float(), mean, value=-1).mul_(inverse_rms)
        return grad_x.to(grad.dtype), grad_weight, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None  # the inverse of a turn is the turn back


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)  # (T, H, S/2)
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    half = x.shape[-1] // 2
    out[..., :half] = torch.addcmul(first * cos, second, sin, value=-1)
    out[..., half:] = torch.addcmul(second * cos, first, sin)
    return out


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


class _ExpertRows(NamedTuple):
    """Token copies sorted by expert, each expert's rows padded to a round number.

    oneDNN compiles a kernel for each shape it meets; padding keeps the shapes few. A padding row
    repeats slot 0 with weight 0: it costs a little work and changes no sum.
    """

    slot_of_row: Tensor  # (N,) slot t * K + k that each row copies
    row_of_slot: Tensor  # (T * K,)
    is_real: Tensor  # (N, 1) bool, False for padding
    spans: list[tuple[int, slice]]  # (expert, its rows), without experts that have none


def _sort_by_expert(experts: Tensor, *, num_experts: int) -> _ExpertRows:
    """experts (T, K) -> rows of each expert, e.g. counts (70, 0, 3) -> spans 0:72 and 72:75."""
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    spans, shifts, start, padded_start = [], [], 0, 0
    for expert, count in enumerate(counts.tolist()):
        padded = _round_up_rows(count)
        shifts.append(padded_start - start)
        if count:
            spans.append((expert, slice(padded_start, padded_start + padded)))
        start, padded_start = start + count, padded_start + padded
    shift = torch.tensor(shifts, device=flat.device)[flat[order]]
    row = torch.arange(len(order), device=flat.device) + shift  # of each sorted slot
    slot_of_row = order.new_zeros(padded_start)
    slot_of_row[row] = order
    row_of_slot = torch.empty_like(order)
    row_of_slot[order] = row
    is_real = torch.zeros(padded_start, 1, dtype=torch.bool, device=flat.device)
    is_real[row] = True
    return _ExpertRows(slot_of_row, row_of_slot, is_real, spans)


def _round_up_rows(count: int) -> int:
    """To one of 8 sizes per octave: 70 -> 72, 1000 -> 1024, 1100 -> 1152."""
    if count <= MIN_PADDED_ROWS:
        return count
    step = 1 << (count.bit_length() - 4)
    return -(-count // step) * step


class _MoeExperts(torch.autograd.Function):
    """Dropless experts: sort the token copies by expert, run each expert's rows as one product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
    ) -> Tensor:
        layout = _sort_by_expert(experts, num_experts=w1.shape[0])
        rows = x.index_select(0, layout.slot_of_row // experts.shape[1])  # (N, D)
        gate = x.new_empty(len(rows), w1.shape[1])  # (N, F)
        up, out = torch.empty_like(gate), torch.empty_like(rows)
        for e, span in layout.spans:
            torch.mm(rows[span], w1[e].t(), out=gate[span])
            torch.mm(rows[span], w3[e].t(), out=up[span])
            torch.mm(F.silu(gate[span]).mul_(up[span]), w2[e].t(), out=out[span])
        slots = out.index_select(0, layout.row_of_slot).unflatten(0, experts.shape)  # (T, K, D)
        if any(ctx.needs_input_grad):
            ctx.layout = layout
            ctx.save_for_backward(rows, gate, up, out, weights, w1, w2, w3)
        return _sum_slots(slots, weights).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, out, weights, w1, w2, w3 = ctx.saved_tensors
        layout: _ExpertRows = ctx.layout
        row_weights = weights.flatten()[layout.slot_of_row][:, None] * layout.is_real  # (N, 1)
        grad_out = grad.index_select(0, layout.slot_of_row // weights.shape[1])  # (N, D)
        grad_row_weights = (grad_out * out).sum(-1).to(weights.dtype)  # (N,), in fp32 inside
        grad_out.mul_(row_weights.to(grad.dtype))
        grad_rows = torch.empty_like(rows)
        grad_w1, grad_w2, grad_w3 = (torch.zeros_like(w) for w in (w1, w2, w3))
        for e, span in layout.spans:
            activated = F.silu(gate[span])
            grad_hidden = torch.mm(grad_out[span], w2[e])  # (n, F)
            torch.mm(grad_out[span].t(), activated * up[span], out=grad_w2[e])
            grad_up = activated.mul_(grad_hidden)
            grad_gate = torch.ops.aten.silu_backward(grad_hidden.mul_(up[span]), gate[span])
            torch.mm(grad_gate.t(), rows[span], out=grad_w1[e])
            torch.mm(grad_up.t(), rows[span], out=grad_w3[e])
            torch.mm(grad_gate, w1[e], out=grad_rows[span])
            grad_rows[span].addmm_(grad_up, w3[e])
        grad_weights = grad_row_weights.index_select(0, layout.row_of_slot).view_as(weights)
        grad_slots = grad_rows.index_select(0, layout.row_of_slot).unflatten(0, weights.shape)
        return _sum_slots(grad_slots).to(grad.dtype), grad_weights, None, grad_w1, grad_w2, grad_w3


def _sum_slots(slots: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum (T, K, D) over K in fp32 in slot order, weighted by (T, K) where weights are given."""
    total = slots[:, 0].to(torch.float32, copy=True)
    if weights is not None:
        total.mul_(weights[:, :1])
    for k in range(1, slots.shape[1]):
        if weights is None:
            total.add_(slots[:, k])
        else:
            total.addcmul_(slots[:, k].float(), weights[:, k, None])
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and its gradient block by block, in one pass: the logits of all tokens never exist."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        for start in range(0, len(hidden), HEAD_BLOCK):
            block = slice(start, start + HEAD_BLOCK)
            counted = (targets[block] != -100)[:, None]
            target = targets[block, None].masked_fill(~counted, 0)  # (n, 1)
            logits = torch.mm(hidden[block], weight.t())  # (n, V)
            probs = torch.softmax(logits, dim=-1)  # summed in fp32 inside
            # A probability below the smallest number of its dtype would give -log 0.
            likelihood = probs.gather(1, target).float().clamp_min_(torch.finfo(torch.float32).tiny)
            total -= torch.where(counted, likelihood.log(), 0).sum()
            if grad_hidden is not None and grad_weight is not None:
                row = torch.arange(len(probs), device=probs.device)
                probs[row, target[:, 0]] = (likelihood - 1)[:, 0].to(probs.dtype)
                if not counted.all():
                    probs.mul_(counted)
                torch.mm(probs, weight, out=grad_hidden[block])  # the gradient of the logits
                grad_weight += torch.mm(probs.t(), hidden[block])
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, (grad_weight * grad).to(ctx.weight_dtype), None
