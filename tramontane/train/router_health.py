"""Is each layer's router alive and balanced? Shares per expert, their entropy, dead experts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tramontane.nn.router import Routing
from tramontane.train.losses import count_tokens_per_expert

DEAD_SHARE = 0.001


@dataclass(frozen=True)
class LayerLoad:
    """One layer's share of assignments per expert (sums to 1)."""

    shares: tuple[float, ...]

    @property
    def entropy(self) -> float:
        """Of the shares, over that of uniform ones: 1 is balanced, 0 is one expert alone."""
        nats = -sum(share * math.log(share) for share in self.shares if share > 0)
        return nats / math.log(len(self.shares)) if len(self.shares) > 1 else 1.0

    @property
    def dead_experts(self) -> list[int]:
        """Experts that get next to no token."""
        return [e for e, share in enumerate(self.shares) if share < DEAD_SHARE]


class RouterHealth:
    """Collects the routing of several batches; `layers` sums it up."""

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None  # (layers, E)

    def add(self, routing: Sequence[Routing]) -> None:
        """Count the assignments of one batch."""
        if routing:
            counts = torch.stack([count_tokens_per_expert(layer) for layer in routing])
            self._counts = counts if self._counts is None else self._counts + counts

    def layers(self) -> list[LayerLoad]:
        """The load of each layer so far; empty for a dense model."""
        if self._counts is None:
            return []
        shares = self._counts / self._counts.sum(1, keepdim=True)
        return [LayerLoad(tuple(row)) for row in shares.tolist()]

    def find_alarms(self) -> list[str]:
        """What a person should know now, one sentence each."""
        alarms = []
        for index, layer in enumerate(self.layers()):
            if layer.dead_experts:
                alarms.append(f"layer {index}: experts {layer.dead_experts} get no tokens")
            if layer.entropy < 0.75:
                alarms.append(f"layer {index}: load entropy is {layer.entropy:.2f} of uniform")
        return alarms
