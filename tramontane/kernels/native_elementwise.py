"""RMSNorm, RoPE and SwiGLU in C++ (csrc/elementwise.h, csrc/training.h), with their gradients.

In training the passes between the products cost as much as a third of these: here each is one pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tramontane.kernels import fused
from tramontane.kernels.extension import TYPES, is_plain, wants_gradient
from tramontane.kernels.extension import native_kernels as _native
from tramontane.kernels.fused.elementwise import Rotate
from tramontane.kernels.fused.experts import Activation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    fits = weight.shape == x.shape[-1:] and weight.dtype == x.dtype
    if not (fits and is_plain(x, weight)):
        return fused.rms_norm(x, weight, eps)
    if wants_gradient(x, weight):
        return _RMSNorm.apply(x, weight, eps)
    return _norm(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotate`."""
    num_tokens, _, head_dim = x.shape
    fits = (
        cos.shape == sin.shape == (num_tokens, head_dim // 2)
        and head_dim % 2 == 0
        and cos.dtype == sin.dtype == torch.float32
        and x.stride()[1:] == (head_dim, 1)
    )
    if not (fits and is_plain(x[:1], cos, sin) and not wants_gradient(cos, sin)):
        return fused.rotate(x, cos, sin)
    if wants_gradient(x):
        return Rotate.apply(x, cos, sin, _turn)
    return _turn(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    if not (gate.shape == up.shape and gate.dtype == up.dtype and is_plain(gate, up)):
        return fused.swiglu(gate, up)
    if wants_gradient(gate, up):
        return _SwiGLU.apply(gate, up)
    return _activate(gate, up)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out, dim = torch.empty_like(x), x.shape[-1]
    _native.norm(
        x.data_ptr(), TYPES[x.dtype], weight.data_ptr(), TYPES[weight.dtype],
        x.numel() // max(1, dim), dim, eps, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    num_tokens, num_heads, head_dim = x.shape
    if x.stride()[1:] != (head_dim, 1):  # tokens may lie apart, as queries beside keys do
        x = x.contiguous()
    out = x.new_empty(x.shape)
    _native.rotate(
        x.data_ptr(), TYPES[x.dtype], num_tokens, num_heads, head_dim, x.stride(0),
        cos.data_ptr(), sin.data_ptr(), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _activate(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _native.swiglu(
        gate.data_ptr(), up.data_ptr(), TYPES[gate.dtype], gate.numel(), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _differentiate(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, grad_gate, grad_up = (torch.empty_like(gate) for _ in range(3))
    _native.swiglu_grad(
        gate.data_ptr(), up.data_ptr(), grad.data_ptr(), TYPES[gate.dtype], gate.numel(),
        out.data_ptr(), grad_gate.data_ptr(), grad_up.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out, grad_gate, grad_up


# For rows that are contiguous, and of dtypes that the extension has.
ACTIVATION = Activation(_activate, _differentiate)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _norm(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad, dim = grad.contiguous(), x.shape[-1]
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        _native.norm_grad(
            x.data_ptr(), TYPES[x.dtype], weight.data_ptr(), TYPES[weight.dtype], grad.data_ptr(),
            x.numel() // max(1, dim), dim, ctx.eps, grad_x.data_ptr(), grad_weight.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _activate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        _, grad_gate, grad_up = _differentiate(gate, up, grad.contiguous())
        return grad_gate, grad_up
