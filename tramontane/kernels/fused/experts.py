"""Dropless experts: token copies sorted by expert, one product per expert and matrix.

Shapes as in `reference.py`; N rows: T * K token copies sorted by expert, and some padding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tramontane.kernels.reference import NO_EXPERT, check_experts

MIN_PADDED_ROWS = 64  # experts with fewer rows are not padded


class Activation(NamedTuple):
    """SwiGLU of some rows, and its gradient.

    apply(gate, up) -> hidden; differentiate(gate, up, gradient of hidden) -> hidden once more, and
    the gradients of gate and up. The gradient that was given may be overwritten.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    differentiate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def _activate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def _differentiate(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    activated = F.silu(gate)
    hidden = activated * up
    grad_up = activated.mul_(grad)
    return hidden, torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up


ACTIVATION = Activation(_activate, _differentiate)  # in torch


def moe_experts(
    x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> Tensor:
    """See `reference.moe_experts`."""
    return MoeExperts.apply(x, weights, experts, w1, w2, w3, ACTIVATION)


class _ExpertRows(NamedTuple):
    """Token copies sorted by expert, each expert's rows padded to a round number.

    oneDNN compiles a kernel for each shape it meets; padding keeps the shapes few. A padding row
    repeats slot 0 with weight 0: it costs a little work and changes no sum. Slots without an expert
    have the last rows, which nobody computes.
    """

    slot_of_row: Tensor  # (N,) slot t * K + k that each row copies
    row_of_slot: Tensor  # (T * K,)
    is_real: Tensor  # (N, 1) bool, False for padding
    spans: list[tuple[int, slice]]  # (expert, its rows), without experts that have none
    skipped: slice  # rows of the slots without an expert


def _sort_by_expert(experts: Tensor, *, num_experts: int) -> _ExpertRows:
    """experts (T, K) -> rows of each expert, e.g. counts (70, 0, 3) -> spans 0:72 and 72:75."""
    check_experts(experts, num_experts)
    flat = experts.flatten()
    flat = flat.masked_fill(flat == NO_EXPERT, num_experts)  # as if it were one more
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts + 1)
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
    skipped = slice(padded_start - padded, padded_start)
    if padded:
        spans.pop()
    return _ExpertRows(slot_of_row, row_of_slot, is_real, spans, skipped)


def _round_up_rows(count: int) -> int:
    """To one of 8 sizes per octave: 70 -> 72, 1000 -> 1024, 1100 -> 1152."""
    if count <= MIN_PADDED_ROWS:
        return count
    step = 1 << (count.bit_length() - 4)
    return -(-count // step) * step


class MoeExperts(torch.autograd.Function):
    """Dropless experts: sort the token copies by expert, run each expert's rows as one product.

    `activation` is what stands between the products: here, or in C++.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        activation: Activation,
    ) -> Tensor:
        """See `reference.moe_experts`."""
        layout = _sort_by_expert(experts, num_experts=w1.shape[0])
        rows = x.index_select(0, layout.slot_of_row // experts.shape[1])  # (N, D)
        gate = x.new_empty(len(rows), w1.shape[1])  # (N, F)
        up, out = torch.empty_like(gate), torch.empty_like(rows)
        for e, span in layout.spans:
            torch.mm(rows[span], w1[e].t(), out=gate[span])
            torch.mm(rows[span], w3[e].t(), out=up[span])
            torch.mm(activation.apply(gate[span], up[span]), w2[e].t(), out=out[span])
        out[layout.skipped] = -0.0  # what leaves every sum as it is, to the bit
        slots = out.index_select(0, layout.row_of_slot).unflatten(0, experts.shape)  # (T, K, D)
        if any(ctx.needs_input_grad):
            ctx.layout, ctx.activation = layout, activation
            ctx.save_for_backward(rows, gate, up, out, weights, w1, w2, w3)
        return _sum_slots(slots, weights).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """From the gradient of y to those of all but `experts`."""
        rows, gate, up, out, weights, w1, w2, w3 = ctx.saved_tensors
        layout: _ExpertRows = ctx.layout
        row_weights = weights.flatten()[layout.slot_of_row][:, None] * layout.is_real  # (N, 1)
        grad_out = grad.index_select(0, layout.slot_of_row // weights.shape[1])  # (N, D)
        grad_row_weights = (grad_out * out).sum(-1).to(weights.dtype)  # (N,), in fp32 inside
        grad_out.mul_(row_weights.to(grad.dtype))
        grad_rows = torch.empty_like(rows)
        grad_w1, grad_w2, grad_w3 = (torch.zeros_like(w) for w in (w1, w2, w3))
        for e, span in layout.spans:
            grad_hidden = torch.mm(grad_out[span], w2[e])  # (n, F)
            hidden, grad_gate, grad_up = ctx.activation.differentiate(
                gate[span], up[span], grad_hidden
            )
            torch.mm(grad_out[span].t(), hidden, out=grad_w2[e])
            torch.mm(grad_gate.t(), rows[span], out=grad_w1[e])
            torch.mm(grad_up.t(), rows[span], out=grad_w3[e])
            torch.mm(grad_gate, w1[e], out=grad_rows[span])
            grad_rows[span].addmm_(grad_up, w3[e])
        grad_rows[layout.skipped] = 0
        grad_weights = grad_row_weights.index_select(0, layout.row_of_slot).view_as(weights)
        grad_slots = grad_rows.index_select(0, layout.row_of_slot).unflatten(0, weights.shape)
        grad_x = _sum_slots(grad_slots).to(grad.dtype)
        return grad_x, grad_weights, None, grad_w1, grad_w2, grad_w3, None


def _sum_slots(slots: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum (T, K, D) over K in fp32 in slot order, weighted by (T, K) where weights are given."""
    dtype = torch.promote_types(slots.dtype, torch.float32)
    total = slots[:, 0].to(dtype, copy=True)
    if weights is not None:
        total.mul_(weights[:, :1])
    for k in range(1, slots.shape[1]):
        if weights is None:
            total.add_(slots[:, k])
        else:
            total.addcmul_(slots[:, k].to(dtype), weights[:, k, None].to(dtype))
    return total
