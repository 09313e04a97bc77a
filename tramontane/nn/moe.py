"""The sparse feed-forward layer: a router and experts, both interchangeable."""

import torch
from torch import Tensor, nn

from tramontane.config import ModelConfig, MoeConfig
from tramontane.kernels.dispatch import get_kernels
from tramontane.kernels.reference import widen
from tramontane.nn.experts import GroupedExperts
from tramontane.nn.feed_forward import FeedForward
from tramontane.nn.router import Routing
from tramontane.nn.routers.build import build_router


class MoeLayer(nn.Module):
    """Routes each token to its experts and returns their weighted sum, with the routing."""

    def __init__(
        self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0, causal: bool = True
    ) -> None:
        super().__init__()
        self.gate = build_router(config, moe, layer=layer, causal=causal)
        self.experts = GroupedExperts(config, moe)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (T, D) -> (y (T, D), Routing); counts (T,) int64 experts instead of the router's.

        Only the router top_k takes counts.
        """
        routing = self.gate(x) if counts is None else self.gate(x, counts)
        return self.gate.finish(self.experts(x, routing)), routing


class ResidualMoeLayer(MoeLayer):
    """A dense network for every token, and experts that correct it (arXiv:2201.05596, section 4).

    A softmax of two scores shares the sum out between them, as in DeepSpeed.
    """

    def __init__(
        self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0, causal: bool = True
    ) -> None:
        super().__init__(config, moe, layer=layer, causal=causal)
        self.residual = FeedForward(config)
        self.mix = nn.Linear(config.dim, 2)

    def forward(self, x: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x (T, D) -> (y (T, D), Routing); counts as in `MoeLayer`."""
        y, routing = super().forward(x, counts)
        scores = get_kernels().linear(x, self.mix.weight) + self.mix.bias
        share = torch.softmax(widen(scores), dim=-1)  # (T, 2)
        dense, _ = self.residual(x)
        return (share[:, :1] * y + share[:, 1:] * dense).to(x.dtype), routing


def build_moe_layer(config: ModelConfig, moe: MoeConfig, *, layer: int) -> MoeLayer:
    """The sparse part of one layer of a decoder."""
    kind = ResidualMoeLayer if moe.residual else MoeLayer
    return kind(config, moe.for_layer(layer), layer=layer)
