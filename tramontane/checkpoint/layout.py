"""What a layout of checkpoints has to tell: the seam behind which Hugging Face folders stand."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tramontane.checkpoint.names import TensorMap
from tramontane.checkpoint.stored_tensor import StoredTensor
from tramontane.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint lies on disk.

    `is_at` recognises it by its file names alone. `read_config` and `find_tensors` read headers, no
    weights. `check_names` raises CheckpointError where the names that the checkpoint has contradict
    its configuration as a whole; `map_names` says where each tensor goes.
    """

    name: str
    looks_for: str
    is_at: Callable[[Path], bool]
    read_config: Callable[[Path], ModelConfig]
    find_tensors: Callable[[Path], Mapping[str, StoredTensor]]
    check_names: Callable[[ModelConfig, Collection[str]], None]
    map_names: Callable[[ModelConfig, Collection[str]], TensorMap]
