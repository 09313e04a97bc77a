"""Is each layer's router alive and balanced? Load per expert, its entropy, drops, dead experts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tramontane.nn.router import Routing
from tramontane.train.losses import count_tokens_per_expert, list_choices

DEAD_SHARE = 0.001
LOW_ENTROPY = 0.75


@dataclass(frozen=True)
class LayerLoad:
    """One layer's share of choices per expert (sums to 1), before capacity drops any.

    `dropped` is the share of choices that capacity refused, `experts_per_token` what was left.
    """

    shares: tuple[float, ...]
    dropped: float = 0.0
    experts_per_token: float = 0.0

    @property
    def entropy(self) -> float:
        """Of the shares, over that of uniform ones: 1 is balanced, 0 is one expert alone."""
        nats = -sum(share * math.log(share) for share in self.shares if share > 0)
        return nats / math.log(len(self.shares)) if len(self.shares) > 1 else 1.0

    @property
    def max_over_mean(self) -> float:
        """The largest load over the mean: 1 is balanced, E is one expert alone."""
        return max(self.shares) * len(self.shares)

    @property
    def dead_experts(self) -> list[int]:
        """Experts that get next to no token."""
        return [e for e, share in enumerate(self.shares) if share < DEAD_SHARE]


class RouterHealth:
    """Collects the routing of several batches; `layers` sums it up."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []  # of each layer: choices by expert (E,), drops, tokens

    def add(self, routing: Sequence[Routing], *, mask: Tensor | None = None) -> None:
        """Count the choices of one batch, of tokens where `mask` (T,) is true."""
        sums = [_count(layer, mask) for layer in routing]
        pairs = zip(self._sums, sums, strict=True)
        self._sums = [old + new for old, new in pairs] if self._sums else sums

    def counts(self) -> list[Tensor]:
        """Choices by expert (E,) of each layer."""
        return [sums[:-2] for sums in self._sums]

    def layers(self) -> list[LayerLoad]:
        """The load of each layer so far; empty for a dense model, or if there was no token."""
        loads = []
        for sums in self._sums:
            *counts, dropped, num_tokens = sums.tolist()
            if total := sum(counts):
                shares = tuple(count / total for count in counts)
                loads.append(LayerLoad(shares, dropped / total, (total - dropped) / num_tokens))
        return loads


def _count(routing: Routing, mask: Tensor | None) -> Tensor:
    """(E + 2,): choices by expert, drops, tokens."""
    is_dropped = (list_choices(routing) >= 0) & (routing.experts < 0)  # (T, K)
    if mask is not None:
        is_dropped = is_dropped[mask.to(is_dropped.device)]
    num_tokens = torch.full_like(is_dropped.sum(), len(is_dropped))
    ends = torch.stack([is_dropped.sum(), num_tokens])
    return torch.cat([count_tokens_per_expert(routing, mask=mask), ends])


def describe_layers(layers: Sequence[LayerLoad]) -> dict[str, list[Any]]:
    """One line of the log: each measure, layer by layer."""
    return {
        "load": [[round(share, 4) for share in layer.shares] for layer in layers],
        "entropy": [round(layer.entropy, 4) for layer in layers],
        "max_over_mean": [round(layer.max_over_mean, 3) for layer in layers],
        "dead": [len(layer.dead_experts) for layer in layers],
        "dropped": [round(layer.dropped, 4) for layer in layers],
        "experts_per_token": [round(layer.experts_per_token, 3) for layer in layers],
    }


class RouterWatch:
    """Says once when an expert dies or a router collapses: for `patience` steps in a row."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self._steps: dict[tuple[int, int | None], int] = {}  # layer, expert -> bad steps so far

    def observe(self, layers: Sequence[LayerLoad]) -> list[str]:
        """Look at the load of one more step; returns what has become bad with it."""
        alarms = []
        for index, layer in enumerate(layers):
            for expert, share in enumerate(layer.shares):
                if self._is_new(index, expert, is_bad=share == 0):
                    alarms.append(
                        f"layer {index}: expert {expert} has had no token for {self.patience} steps"
                    )
            if self._is_new(index, None, is_bad=layer.entropy < LOW_ENTROPY):
                alarms.append(
                    f"layer {index}: the entropy of its load has been below {LOW_ENTROPY} of an "
                    f"even one for {self.patience} steps"
                )
        return alarms

    def _is_new(self, layer: int, expert: int | None, *, is_bad: bool) -> bool:
        """Whether this has just been bad for long enough."""
        steps = self._steps.get((layer, expert), 0) + 1 if is_bad else 0
        self._steps[layer, expert] = steps
        return steps == self.patience
