"""Two experts, the second at random: GShard (arXiv:2006.16668), ST-MoE (arXiv:2202.08906)."""

import torch
from torch import Tensor

from tramontane.config import ModelConfig, MoeConfig
from tramontane.config.moe import StMoeOptions
from tramontane.kernels.reference import top_k_routing
from tramontane.nn.router import Router, Routing
from tramontane.nn.routers.capacity import limit_to_capacity


class SecondExpertRouter(Router):
    """Top-2 whose second expert is taken with probability min(1, weight / threshold).

    A threshold of 1/2 is GShard's rule, 2 * weight > uniform(0, 1). Outside of training nothing is
    drawn: the second is taken where that is as likely as not. The first keeps its weight.
    """

    is_random = True

    def __init__(self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0) -> None:
        super().__init__(config, moe, layer=layer)
        assert isinstance(moe.options, StMoeOptions)
        self.options = moe.options

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing with K = 2."""
        options = self.options
        logits = self.score(x)
        weights, experts = top_k_routing(logits, 2)
        taken = torch.ones_like(experts, dtype=torch.bool)
        taken[:, 1] = self._take_second(weights.detach()[:, 1])
        routing = Routing(weights.where(taken, 0.0), experts.where(taken, -1), logits)
        factor = options.capacity_factor if self.training else options.eval_capacity_factor
        return limit_to_capacity(routing, factor)

    def _take_second(self, weight: Tensor) -> Tensor:
        """Whether the second experts, of weight (T,), are taken."""
        if not self.training:
            return weight >= self.options.threshold / 2
        assert self.draws is not None
        generator = self.draws.next_generator(weight.device)
        uniform = torch.empty_like(weight).uniform_(generator=generator)
        return uniform * self.options.threshold < weight
