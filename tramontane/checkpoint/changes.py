"""What has to be done to a foreign tensor so that it is one of ours, and the way back.

Both ways give views where torch can. H heads, S head_dim, D dim.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Change(NamedTuple):
    """A reordering of values; `to_theirs(to_ours(x))` is x.

    `to_ours` may be given some of their rows at a time, a multiple of `block`: they become as many
    of dimension `axis` of ours, at the same place.
    """

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]
    block: int = 1
    axis: int = 0


def _return_same(values: Tensor) -> Tensor:
    return values


def _transpose(values: Tensor) -> Tensor:
    return values.t()


SAME = Change(_return_same, _return_same)
TRANSPOSE = Change(_transpose, _transpose, axis=1)


def pair_halves(head_dim: int) -> Change:
    """RoPE turns neighbouring rows (0, 1), (2, 3), ... there, and (0, S/2), (1, S/2 + 1), ... here.

    With S = 4 their rows 0 1 2 3 of a head become our rows 0 2 1 3. Values are (H * S, D).
    """
    half = head_dim // 2

    def to_ours(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)

    def to_theirs(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, 2, half)).transpose(1, 2).flatten(0, 2)

    return Change(to_ours, to_theirs, block=head_dim)
