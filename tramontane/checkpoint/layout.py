"""What a layout of checkpoints has to tell: the seam behind which all of them stand."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.checkpoint.names import NameTable
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError

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


@dataclass(frozen=True)
class Layout:
    """How one kind of checkpoint lies on disk.

    A checkpoint is of the layout whose `tables` know most of its tensors. `read_config` gives the
    configuration, from `config_file` beside the weights or from their header.
    """

    name: str
    containers: tuple[Container, ...]
    tables: tuple[NameTable, ...]
    config_file: str
    read_config: Callable[[Contents], ModelConfig]

    def choose_table(self, stored: Collection[str]) -> NameTable:
        """The table that knows most of the names; the first of equals."""
        return max(self.tables, key=lambda table: table.count_matches(stored))


def check_names(
    table: NameTable, config: ModelConfig, stored: Mapping[str, StoredTensor], *, where: str
) -> None:
    """Raise CheckpointError if `where` speaks of another kind or number of layers or experts."""
    num_experts = table.count_experts(stored)
    if (num_experts == 0) != (config.moe is None):
        kinds = {True: "a dense model ('mistral')", False: "a mixture of experts ('mixtral')"}
        raise CheckpointError(
            f"{where} describes {kinds[config.moe is None]}, the tensors are "
            f"{kinds[num_experts == 0]}; these files do not belong together"
        )
    counts = {"n_layers": (config.n_layers, table.count_layers(stored))}
    if config.moe is not None:
        counts["num_experts"] = (config.moe.num_experts, num_experts)
    for name, (said, found) in counts.items():
        if said != found:
            raise CheckpointError(
                f"{where}: {table.fields[name]} is {said}, the tensors have {found}; "
                "incomplete download, or files that do not belong together?"
            )
