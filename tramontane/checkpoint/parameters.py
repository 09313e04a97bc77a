"""Our parameters out of a checkpoint's tensors, whatever its layout; and out of a model's memory.

A reader gives whole parameters or single experts, so that a model larger than memory can be
converted one tensor at a time.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tramontane.checkpoint.check import TensorPair, check_finite_values
from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.checkpoint.name_table import Part


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
    """Those of a checkpoint on disk. Values that are NaN or infinite are a CheckpointError."""

    def __init__(self, pairs: Sequence[TensorPair]) -> None:
        self._sources: dict[tuple[str, int | None], tuple[Part, StoredTensor]] = {}
        for pair in pairs:
            for part in pair.expected.parts:
                self._sources[part.parameter, part.expert] = (part, part.locate(pair.stored))

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `Parameters`."""
        if (parameter, expert) in self._sources:
            part, stored = self._sources[parameter, expert]
            values = part.change.to_ours(stored.read())
            check_finite_values(values, stored)
            return values
        count = sum(name == parameter for name, _ in self._sources)
        assert expert is None, f"expert {expert} of {parameter} is not stored"
        return torch.stack([self.read(parameter, e) for e in range(count)])
