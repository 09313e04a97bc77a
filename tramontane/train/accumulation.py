"""What the batches of one step have in common, so that they add up to one large batch.

Sums over targets add up by themselves. The router's losses do not: they are means over tokens, and
the load-balancing loss multiplies two of them, E * sum_e f_e P_e. It is linear in P, so with the f
of the whole step, and each batch weighed by its tokens, gradients and losses are those of one
batch. f is known only when all tokens have been routed: batches run forward once to count.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from tramontane.train.losses import LossTerms, count_tokens_per_expert


@dataclass(frozen=True)
class StepTotals:
    """Units and tokens of some batches, and `loads`, the slots per token of each layer (E,)."""

    num_units: int
    num_tokens: int
    loads: tuple[Tensor, ...]

    @classmethod
    def add_up(cls, batches: Iterable[LossTerms]) -> Self:
        """The totals of at least one batch; one at a time is kept in memory."""
        num_units = num_tokens = 0
        counts: list[Tensor] = []
        for terms in batches:
            num_units += terms.num_units
            num_tokens += _count_tokens(terms)
            mask = terms.token_mask
            more = [count_tokens_per_expert(layer, mask=mask) for layer in terms.routing]
            counts = [a + b for a, b in zip(counts, more, strict=True)] if counts else more
            del terms  # its graph, before the next one is built
        return cls(num_units, num_tokens, tuple(c / max(1, num_tokens) for c in counts))

    def weigh(self, terms: LossTerms) -> float:
        """The units that a mean over the tokens of this batch counts for."""
        return self.num_units * (_count_tokens(terms) / max(1, self.num_tokens))


def _count_tokens(terms: LossTerms) -> int:
    """Tokens that were routed, padding apart; 0 for a dense model."""
    if not terms.routing or terms.token_mask is None:
        return len(terms.routing[0].logits) if terms.routing else 0
    return int(terms.token_mask.sum())
