"""The tensors of a layout, put together from our parameters as a writer asks for them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tramontane.checkpoint.files.stored_tensor import DTYPES
from tramontane.checkpoint.name_table import ExpectedTensor, NameTable
from tramontane.checkpoint.parameters import Parameters
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError

_NARROW = {
    torch.float16: ("fp16", "write BF16 or F32"),
    torch.bfloat16: ("bf16", "write F32"),
}


@dataclass(frozen=True)
class Assembly:
    """All tensors of a checkpoint of `config` under the names of `table`, in their order on disk.

    The experts of a matrix follow one another, so that a stack can be mapped as it lies.
    """

    table: NameTable
    config: ModelConfig
    parameters: Parameters

    def list_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name; a tied head is not there."""
        return {name: tensor.shape for name, tensor in self._expected.items()}

    def list_exceptions(self) -> dict[str, torch.dtype]:
        """The dtype of tensors that have one of their own, by name."""
        tensors = self._expected.items()
        return {name: DTYPES[t.encoding] for name, t in tensors if t.encoding is not None}

    def build(self, name: str) -> Tensor:
        """The values of one tensor, a view where that is possible."""
        expected = self._expected[name]
        values = [
            part.change.to_theirs(self.parameters.read(part.parameter, part.expert))
            for part in expected.parts
        ]
        whole = values[0] if len(values) == 1 else torch.stack(values)
        return whole.reshape(expected.shape)

    @cached_property
    def _expected(self) -> dict[str, ExpectedTensor]:
        expected = self.table.map_tensors(self.config)
        return {name: tensor for name, tensor in expected.items() if not tensor.is_optional}


def convert_values(values: Tensor, dtype: torch.dtype, *, name: str) -> Tensor:
    """In `dtype`. Raises CheckpointError where fp16 or bf16 has no such number."""
    converted = values.to(device="cpu", dtype=dtype)
    if dtype != torch.float32 and values.dtype != dtype and converted.numel():
        low, high = converted.aminmax()
        if not (low.isfinite() and high.isfinite()):
            short, remedy = _NARROW[dtype]
            largest = values.abs().max().item()
            raise CheckpointError(f"{name} has values beyond {short} ({largest:g}); {remedy}")
    return converted
