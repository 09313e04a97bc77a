"""What has to be done to a foreign tensor so that it is one of ours, and the way back.

Both ways give views wherever torch can: nothing is copied until the values are put in their place.
H heads, S head_dim, D dim, E experts, F hidden_dim.
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


SAME = Change(_return_same, _return_same)


def pair_halves(num_heads: int) -> Change:
    """RoPE turns neighbouring rows (0, 1), (2, 3), ... there, and (0, S/2), (1, S/2 + 1), ... here.

    With S = 4 their rows 0 1 2 3 of a head become our rows 0 2 1 3. Values are (H * S, D).
    """

    def to_ours(values: Tensor) -> Tensor:
        return values.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def to_theirs(values: Tensor) -> Tensor:
        return values.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    return Change(to_ours, to_theirs)


def split_experts(num_experts: int) -> Change:
    """(E * F, D) there, (E, F, D) here."""
    return Change(
        lambda values: values.unflatten(0, (num_experts, -1)), lambda values: values.flatten(0, 1)
    )


def split_transposed_experts(num_experts: int) -> Change:
    """(E * F, D) there, (E, D, F) here: w2 in the torrent, each expert's transposed."""
    return Change(
        lambda values: values.unflatten(0, (num_experts, -1)).transpose(1, 2),
        lambda values: values.transpose(1, 2).flatten(0, 1),
    )
