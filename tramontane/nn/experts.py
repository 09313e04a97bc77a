"""The expert networks of one layer, stacked: w1, w3 (E, F, D) and w2 (E, D, F)."""

import torch
from torch import Tensor, nn

from tramontane.config import ModelConfig, MoeConfig
from tramontane.kernels.dispatch import get_kernels
from tramontane.nn.router import INIT_BOUND, Routing


class GroupedExperts(nn.Module):
    """SwiGLU experts in the weights' own precision; tokens run grouped, none is dropped."""

    def __init__(self, config: ModelConfig, moe: MoeConfig) -> None:
        super().__init__()
        shape = (moe.num_experts, config.hidden_dim, config.dim)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape[0], shape[2], shape[1]))
        self.w3 = nn.Parameter(torch.empty(shape))
        for weight in self.parameters():
            nn.init.uniform_(weight, -INIT_BOUND, INIT_BOUND)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (T, D) -> the weighted sum of each token's experts, (T, D)."""
        return get_kernels().moe_experts(
            x, routing.weights, routing.experts, self.w1, self.w2, self.w3
        )
