"""RMSNorm (arXiv:1910.07467), in fp32, cast after."""

import torch
from torch import Tensor, nn

from tramontane.kernels.dispatch import get_kernels


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, of size `dim`."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D), in the dtype of x."""
        return get_kernels().rms_norm(x, self.weight, self.eps)
