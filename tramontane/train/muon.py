"""Muon (arXiv:2502.16982) for matrices and stacks of matrices.

torch.optim.Muon takes single matrices and multiplies them in bf16 alone. Here the matrices of a
stack go through together, in the dtype of the computation: a processor without instructions for
bf16 multiplies fp32 four times as fast.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

MOMENTUM = 0.95
NUM_ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Moves each matrix along its orthogonalised Nesterov momentum, with steps of AdamW's size.

    Parameters are (..., A, B): the last two dimensions are a matrix. Weight decay is decoupled.
    `dtype` of the parameter group is that of the products.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "dtype": torch.float32})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {"momentum_buffer": torch.zeros_like(param)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                momentum = self.state[param]["momentum_buffer"]
                momentum.lerp_(param.grad, 1 - MOMENTUM)
                update = param.grad.lerp(momentum, MOMENTUM)
                update = orthogonalize(update.to(group["dtype"]))
                rms_of_adamw = 0.2 * max(param.shape[-2:]) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * rms_of_adamw)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(..., A, B) with all singular values near 1, by a quintic Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    x = flat.mT if is_tall else flat
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(EPS)
    for _ in range(NUM_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)
