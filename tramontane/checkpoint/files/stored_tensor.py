"""A tensor that lies in a file, whatever the format of the file: where, and how to read it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from tramontane.errors import CheckpointError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of weights
UNPACKED = DTYPES | {"U8": torch.uint8}  # all that is read as it lies; bytes have a meaning beside
DTYPE_NAMES = {dtype: name for name, dtype in UNPACKED.items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet. `begin` and `end` count from the start of the file.

    `dtype` is that of the values that `read` gives; formats that pack values are subclasses.
    """

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def encoding(self) -> str:
        """How the values are stored, by the field's own name: F32, F16, BF16, U8, Q4_0, ..."""
        return DTYPE_NAMES[self.dtype]

    @property
    def place(self) -> str:
        """File and name, for messages."""
        return f"{self.path}: {self.name}"

    def select(self, index: int) -> Self:
        """What lies at `index` of the first dimension."""
        return replace(self.narrow(slice(index, index + 1)), shape=self.shape[1:])

    def narrow(self, rows: slice) -> Self:
        """Some of the first dimension: a run of the bytes."""
        assert 0 <= rows.start < rows.stop <= self.shape[0], (rows, self)
        size = (self.end - self.begin) // self.shape[0]
        shape = (rows.stop - rows.start, *self.shape[1:])
        begin = self.begin + rows.start * size
        return replace(self, shape=shape, begin=begin, end=begin + shape[0] * size)

    def read(self) -> Tensor:
        """The values, as a view of the mapped file where its alignment allows, else as a copy.

        Memory fills when it is touched, and writing to it does not reach the disk. Each tensor maps
        its own bytes alone, so that those of a tensor that is copied go as soon as it is dropped.
        """
        if self.begin == self.end:
            return torch.empty(self.shape, dtype=self.dtype)
        data = map_bytes(self.path, self.begin, self.end)
        if self.begin % self.dtype.itemsize:
            data = data.clone()
        return data.view(self.dtype).view(self.shape)

    def read_into(self, target: Tensor) -> None:
        """Fill `target` (contiguous, on the CPU, of this shape and dtype) without mapping the file.

        Faster than copying from `read`, which faults once for each page. Raises CheckpointError if
        the file has become shorter since its header was read.
        """
        assert (target.shape, target.dtype) == (self.shape, self.dtype), (target.shape, self)
        buffer = target.flatten().view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            while buffer:
                count = file.readinto(buffer)
                if not count:
                    raise CheckpointError(f"{self.place} has become shorter while it was read")
                buffer = buffer[count:]


class StackViewer:
    """Gives stacks of tensors as views of the files they lie in.

    Stacks that lie between one another, as w1, w2 and w3 of a layer do, share one map: memory that
    is mapped twice would count twice for the process.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._begin = 0
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def view(self, tensors: Sequence[StoredTensor]) -> Tensor | None:
        """Unpacked tensors of one shape and dtype as one tensor (E, *shape), without a copy.

        Each is contiguous and lies as far from the next as all do: where experts lie as w1 w2 w3
        w1 w2 w3 ..., the w1 are three matrices apart. None where that would take a copy: several
        files, uneven distances, or a place that the dtype cannot have.
        """
        first, last = tensors[0], tensors[-1]
        size, item = first.end - first.begin, first.dtype.itemsize
        step = tensors[1].begin - first.begin if len(tensors) > 1 else size
        is_even = all(t.begin == first.begin + i * step for i, t in enumerate(tensors))
        if not is_even or not 0 < size <= step or any(t.path != first.path for t in tensors):
            return None
        if first.begin % item or step % item:
            return None
        span = replace(first, end=last.end)
        values = self._map(span, num_bytes=len(tensors) * step).view(first.dtype)
        return values.unfold(0, size // item, step // item).unflatten(1, first.shape)

    def _map(self, span: StoredTensor, *, num_bytes: int) -> Tensor:
        """The bytes of the span: of the map made last if that has them, else of one of `num_bytes`.

        So many from its beginning, if the file has them, hold the stacks that lie between.
        """
        offset, size = span.begin - self._begin, span.end - span.begin
        is_inside = span.path == self._path and 0 <= offset <= len(self._bytes) - size
        if not is_inside or offset % span.dtype.itemsize:
            end = max(span.end, min(span.begin + num_bytes, span.path.stat().st_size))
            self._path, self._begin, offset = span.path, span.begin, 0
            self._bytes = map_bytes(span.path, span.begin, end)
        return self._bytes[offset : offset + size]


def map_bytes(path: Path, begin: int, end: int) -> Tensor:
    """Bytes of a file, mapped: memory fills when touched, and writing does not reach the disk."""
    mapped = np.memmap(path, dtype=np.uint8, mode="c", offset=begin, shape=(end - begin,))
    return torch.from_numpy(mapped)
