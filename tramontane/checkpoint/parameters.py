"""Our parameters out of a checkpoint's tensors, whatever its layout; and out of a model's memory.

A reader gives whole parameters or single experts, so that a model larger than memory can be
converted one tensor at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tramontane.checkpoint.check import TensorPair
from tramontane.checkpoint.names import Part
from tramontane.checkpoint.stored_tensor import StoredTensor


class Parameters(Protocol):
    """Where the values of our parameters come from."""

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """A parameter, or one expert of a stacked one, as a view where that is possible."""
        ...


class ParametersInMemory:
    """Those of a model."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `Parameters`."""
        values = self._state[parameter].detach()
        return values if expert is None else values[expert]


class StoredParameters:
    """Those of a checkpoint on disk."""

    def __init__(self, pairs: Sequence[TensorPair]) -> None:
        self._sources: dict[tuple[str, int | None], tuple[Part, StoredTensor]] = {}
        for pair in pairs:
            for part in pair.expected.parts:
                self._sources[part.parameter, part.expert] = (part, pair.stored)
        self._last: tuple[StoredTensor, Tensor] | None = None  # packed stacks are decoded once

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `Parameters`."""
        if (parameter, expert) in self._sources:
            return self._read_part(parameter, expert)
        if expert is not None:
            return self._read_part(parameter, None)[expert]
        count = sum(name == parameter for name, _ in self._sources)
        return torch.stack([self._read_part(parameter, e) for e in range(count)])

    def _read_part(self, parameter: str, expert: int | None) -> Tensor:
        part, stored = self._sources[parameter, expert]
        if self._last is None or self._last[0] is not stored:
            self._last = (stored, stored.read())
        return part.extract(self._last[1])
