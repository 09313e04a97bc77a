"""Routers: which experts see a token, and how much each counts."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tramontane.config import ModelConfig, MoeConfig
from tramontane.kernels.dispatch import get_kernels

# Deviation 0.02. Not normal_: on the device "meta", where checkpoints are loaded, that imports the
# compiler, for a second.
INIT_BOUND = 0.02 * 3**0.5


class Routing(NamedTuple):
    """A router's decision for T tokens.

    A token that uses fewer than K experts has weight 0 and expert -1 in its last slots; experts
    leave those out.
    """

    weights: Tensor  # (T, K) fp32, in falling order, summing to 1
    experts: Tensor  # (T, K) int64, each its own or -1
    logits: Tensor  # (T, E) fp32


class TopKRouter(nn.Module):
    """Mixtral's: softmax over the K largest logits (arXiv:2401.04088, section 2.1)."""

    def __init__(self, config: ModelConfig, moe: MoeConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = moe.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(moe.num_experts, config.dim))
        nn.init.uniform_(self.weight, -INIT_BOUND, INIT_BOUND)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Routing:
        """x (T, D) -> Routing; counts (T,) int64 from 1 to E: experts of each token, K the most."""
        num_slots = self.num_experts_per_tok
        if counts is not None and len(counts):
            num_slots = int(counts.max())
        return Routing(*get_kernels().top_k_router(x, self.weight, num_slots, counts))
