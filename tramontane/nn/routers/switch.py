"""Switch: one expert per token, with a capacity (arXiv:2101.03961)."""

import torch
from torch import Tensor

from tramontane.config import ModelConfig, MoeConfig
from tramontane.config.moe import SwitchOptions
from tramontane.kernels.reference import top_k_routing
from tramontane.nn.router import Router, Routing
from tramontane.nn.routers.capacity import limit_to_capacity


class SwitchRouter(Router):
    """The likeliest expert, weighted by its probability among all.

    Not renormalised: a weight that is always 1 would give the router no gradient.
    """

    is_random = True

    def __init__(self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0) -> None:
        super().__init__(config, moe, layer=layer)
        assert isinstance(moe.options, SwitchOptions)
        self.options = moe.options

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing with K = 1."""
        options = self.options
        logits = self.score(self._jitter(x))
        _, experts = top_k_routing(logits, 1)
        weights = torch.softmax(logits, dim=-1).gather(1, experts)  # (T, 1)
        factor = options.capacity_factor if self.training else options.eval_capacity_factor
        return limit_to_capacity(Routing(weights, experts, logits), factor)

    def _jitter(self, x: Tensor) -> Tensor:
        if not self.training or self.options.jitter == 0:
            return x
        assert self.draws is not None
        low, high = 1 - self.options.jitter, 1 + self.options.jitter
        generator = self.draws.next_generator(x.device)
        return x * torch.empty_like(x).uniform_(low, high, generator=generator)
