"""Noisy top-k gating (Shazeer et al., arXiv:1701.06538, section 2.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tramontane.config import ModelConfig, MoeConfig
from tramontane.kernels.dispatch import get_kernels
from tramontane.kernels.reference import top_k_routing, widen
from tramontane.nn.router import INIT_BOUND, Router, Routing


class NoisyTopKRouter(Router):
    """Top-k of logits + N(0, 1) * softplus(x W_noise^T): the chance of an expert is learnt.

    `logits` are those with noise. Outside of training there is none.
    """

    is_random = True

    def __init__(self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0) -> None:
        super().__init__(config, moe, layer=layer)
        self.noise_weight = nn.Parameter(torch.empty(moe.num_experts, config.dim))
        nn.init.uniform_(self.noise_weight, -INIT_BOUND, INIT_BOUND)

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing."""
        logits = self.score(x)
        if self.training:
            assert self.draws is not None
            deviation = F.softplus(widen(get_kernels().linear(x, self.noise_weight)))  # (T, E)
            generator = self.draws.next_generator(x.device)
            logits = logits + deviation * torch.empty_like(logits).normal_(generator=generator)
        return Routing(*top_k_routing(logits, self.num_experts_per_tok), logits)
