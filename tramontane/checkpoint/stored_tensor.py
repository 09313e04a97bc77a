"""A tensor that lies in a file, whatever the format of the file: where, and how to read it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
        """How the values are stored, by the field's own name: F32, F16, BF16, Q4_0, ..."""
        return DTYPE_NAMES[self.dtype]

    @property
    def place(self) -> str:
        """File and name, for messages."""
        return f"{self.path}: {self.name}"

    def read(self) -> Tensor:
        """The values, as a view of the mapped file where its alignment allows, else as a copy.

        Memory fills when it is touched, and writing to it does not reach the disk. Each tensor maps
        its own bytes alone, so that those of a tensor that is copied go as soon as it is dropped.
        """
        if self.begin == self.end:
            return torch.empty(self.shape, dtype=self.dtype)
        size = self.end - self.begin
        mapped = np.memmap(self.path, dtype=np.uint8, mode="c", offset=self.begin, shape=(size,))
        data = torch.from_numpy(mapped)
        if self.begin % self.dtype.itemsize:
            data = data.clone()
        return data.view(self.dtype).view(self.shape)
