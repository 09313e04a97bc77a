"""What a layout of checkpoints has to tell: the seam behind which all of them stand."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.checkpoint.name_table import NameTable, TensorMap
from tramontane.config import ModelConfig
from tramontane.quant.formats import QuantFormat

Formats = Mapping[str, QuantFormat]  # of our parameters, by name
Container = Literal["safetensors", "gguf", "torch"]


@dataclass(frozen=True)
class Contents:
    """The headers of a checkpoint's files: no weight has been read.

    `path` is what the user named, `folder` where other files of the model are; `metadata` is what
    a GGUF says beside its tensors.
    """

    path: Path
    folder: Path
    container: Container
    files: tuple[Path, ...]
    stored: Mapping[str, StoredTensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def _assume_nothing(contents: Contents) -> tuple[str, ...]:
    return ()


def _find_no_formats(tensors: TensorMap, contents: Contents) -> Formats:
    return {}


def _keep_tensors(tensors: TensorMap, formats: Formats) -> TensorMap:
    return tensors


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint lies on disk.

    A checkpoint is of the layout whose `tables` know most of its tensors. `read_config` gives the
    configuration, from `config_file` beside the weights or from their header, and `list_assumed`
    what of it nobody said, although it could have been said. `find_formats` tells
    which of our parameters can be run packed as they are stored, given the tensors that the table
    expects; `pack_tensors` says how those tensors lie then, where it is otherwise (`is_quantized`).
    """

    name: str
    containers: tuple[Container, ...]
    tables: tuple[NameTable, ...]
    config_file: str
    read_config: Callable[[Contents], ModelConfig]
    list_assumed: Callable[[Contents], tuple[str, ...]] = _assume_nothing
    find_formats: Callable[[TensorMap, Contents], Formats] = _find_no_formats
    pack_tensors: Callable[[TensorMap, Formats], TensorMap] = _keep_tensors
    is_quantized: bool = False

    def choose_table(self, stored: Collection[str]) -> NameTable:
        """The table that knows most of the names; the first of equals."""
        return max(self.tables, key=lambda table: table.count_matches(stored))
