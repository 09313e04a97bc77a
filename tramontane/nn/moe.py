"""The sparse feed-forward layer: a router and experts, both interchangeable."""

from torch import Tensor, nn

from tramontane.config import ModelConfig, MoeConfig
from tramontane.nn.experts import GroupedExperts
from tramontane.nn.router import Routing, TopKRouter


class MoeLayer(nn.Module):
    """Routes each token to its experts and returns their weighted sum, with the routing."""

    def __init__(self, config: ModelConfig, moe: MoeConfig) -> None:
        super().__init__()
        self.gate = TopKRouter(config, moe)
        self.experts = GroupedExperts(config, moe)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (T, D) -> (y (T, D), Routing); counts (T,) int64 experts instead of the router's."""
        routing = self.gate(x) if counts is None else self.gate(x, counts)
        return self.experts(x, routing), routing
