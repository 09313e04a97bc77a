"""Values as GGUF packs them: how many bytes a block takes, and unpacking by the gguf library.

A row is cut into blocks of `block_size` values, each of `block_bytes` bytes: a Q4_0 block has 32
values of 4 bits and one fp16 scale, 18 bytes. Sizes are known without the library.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.errors import CheckpointError

_MAX_STEP = 2**22  # values unpacked at once


class Packing(NamedTuple):
    """One of GGML's types of tensors."""

    name: str
    block_size: int
    block_bytes: int


# By GGML's number. Those of one value a block need no unpacking.
PACKINGS = {
    0: Packing("F32", 1, 4),
    1: Packing("F16", 1, 2),
    2: Packing("Q4_0", 32, 18),
    3: Packing("Q4_1", 32, 20),
    6: Packing("Q5_0", 32, 22),
    7: Packing("Q5_1", 32, 24),
    8: Packing("Q8_0", 32, 34),
    10: Packing("Q2_K", 256, 84),
    11: Packing("Q3_K", 256, 110),
    12: Packing("Q4_K", 256, 144),
    13: Packing("Q5_K", 256, 176),
    14: Packing("Q6_K", 256, 210),
    30: Packing("BF16", 1, 2),
}
# Types that exist but are not read, for messages.
OTHER_PACKINGS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A tensor in a GGUF file whose values come in blocks; `dtype` is that of unpacked values."""

    packing: Packing

    @property
    def encoding(self) -> str:
        """The name of the packing: Q4_0, Q6_K, ..."""
        return self.packing.name

    def read(self) -> Tensor:
        """The values in fp32, in memory of their own. Raises what `read_into` does."""
        values = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(values)
        return values

    def read_blocks(self) -> Tensor:
        """The blocks as they lie in the mapped file: (rows, bytes of a row), uint8."""
        shape = (math.prod(self.shape[:-1]), -1)
        packed = np.memmap(
            self.path, np.uint8, mode="c", offset=self.begin, shape=(self.end - self.begin,)
        )
        return torch.from_numpy(packed).view(shape)

    def read_into(self, target: Tensor) -> None:
        """Fill `target` (contiguous, of this shape, any float), unpacking some rows at a time.

        Raises CheckpointError if the gguf library is not there.
        """
        library = load_gguf_library(f"{self.place} ({self.encoding})")
        kind = library.GGMLQuantizationType[self.encoding]
        assert target.shape == self.shape, (target.shape, self)
        row_size, num_rows = self.shape[-1], math.prod(self.shape[:-1])
        row_bytes = (self.end - self.begin) // num_rows
        values = target.view(num_rows, row_size)
        step = max(1, _MAX_STEP // row_size)
        for begin in range(0, num_rows, step):
            # Each step maps its own rows: pages that were read stay in memory as long as their map.
            shape = (min(step, num_rows - begin), row_bytes)
            at = self.begin + begin * row_bytes
            packed = np.memmap(self.path, dtype=np.uint8, mode="r", offset=at, shape=shape)
            with np.errstate(all="ignore"):  # scales that are not finite give values that are not
                part = library.quants.dequantize(packed, kind)
            values[begin : begin + step] = torch.from_numpy(part)


def load_gguf_library(wanted_for: Path | str) -> ModuleType:
    """The gguf library, or CheckpointError, naming what it is wanted for, if it is not there.

    It is optional, and takes half a second to import: only who reads packed values waits for it.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{wanted_for}: packing and unpacking GGUF takes the gguf library, which is not "
            "installed: pip install 'tramontane[gguf]'"
        ) from None
    library: ModuleType = gguf
    return library
