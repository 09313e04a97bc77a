"""What has to be done to a foreign tensor so that it is one of ours, and the way back.

Both ways give views where torch can. H heads, S head_dim, D dim.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Change(NamedTuple):
    """A reordering of values; `to_theirs(to_ours(x))` is x."""

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def _return_same(values: Tensor) -> Tensor:
    return values


def _transpose(values: Tensor) -> Tensor:
    return values.t()


SAME = Change(_return_same, _return_same)
TRANSPOSE = Change(_transpose, _transpose)


def pair_halves(num_heads: int) -> Change:
    """RoPE turns neighbouring rows (0, 1), (2, 3), ... there, and (0, S/2), (1, S/2 + 1), ... here.

    With S = 4 their rows 0 1 2 3 of a head become our rows 0 2 1 3. Values are (H * S, D).
    """

    def to_ours(values: Tensor) -> Tensor:
        return values.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def to_theirs(values: Tensor) -> Tensor:
        return values.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    return Change(to_ours, to_theirs)
