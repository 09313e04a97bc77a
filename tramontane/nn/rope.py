"""Rotary position embedding (arXiv:2104.09864): the angles by which queries and keys turn."""

from typing import NamedTuple

import torch
from torch import Tensor


class RopeAngles(NamedTuple):
    """cos and sin of the angle of each position and pair, fp32, (T, S/2) each."""

    cos: Tensor
    sin: Tensor


def compute_rope(positions: Tensor, *, head_dim: int, theta: float) -> RopeAngles:
    """Angles position * theta^(-2i / S) for the pairs i = 0 .. S/2 - 1; positions is (T,)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / (theta ** (exponents / head_dim))  # (S/2,)
    angles = positions[:, None].float() * frequencies  # (T, S/2)
    return RopeAngles(angles.cos(), angles.sin())
