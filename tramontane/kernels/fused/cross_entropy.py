"""The head and its cross-entropy block by block: the logits of all tokens never exist.

Shapes as in `reference.py`; n tokens make a block.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HEAD_BLOCK = 1024  # tokens per block


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """See `reference.linear_cross_entropy`."""
    return _LinearCrossEntropy.apply(hidden, weight, targets)


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
