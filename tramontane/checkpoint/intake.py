"""What lies at a path: files told apart by their first bytes, a layout by the tensors' names.

Nothing in a file is run: the pickle in a torch archive is read as symbols (files/torch_file.py),
and pickles of the old kind are refused by name.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tramontane.atomic import find_previous
from tramontane.checkpoint.check import TensorPair, find_common_dtype, match_tensors
from tramontane.checkpoint.files.gguf_file import read_gguf
from tramontane.checkpoint.files.safetensors_file import read_table
from tramontane.checkpoint.files.stored_tensor import DTYPES, StoredTensor
from tramontane.checkpoint.files.torch_file import read_torch_table
from tramontane.checkpoint.gguf import GGUF
from tramontane.checkpoint.hf import HUGGING_FACE, check_index, read_index
from tramontane.checkpoint.layout import Container, Contents, Layout, check_names
from tramontane.checkpoint.mistral import MISTRAL
from tramontane.checkpoint.names import NameTable
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError

LAYOUTS: tuple[Layout, ...] = (HUGGING_FACE, MISTRAL, GGUF)
_LOOKED_FOR = "safetensors, GGUF, or torch archives (consolidated.00.pt)"
_INDEX_SUFFIX = ".safetensors.index.json"
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been recognised; its configuration and tensors are there on demand."""

    layout: Layout
    table: NameTable
    contents: Contents

    @cached_property
    def config(self) -> ModelConfig:
        """The configuration. Raises CheckpointError or ConfigError, naming file and field."""
        return self.layout.read_config(self.contents)

    @property
    def where_config_is(self) -> str:
        """For messages: the file, or "the metadata"."""
        return self.layout.config_file

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights. In a GGUF that of most values, and bfloat16 for packed ones.

        Raises CheckpointError on safetensors of several dtypes.
        """
        if self.contents.container != "gguf":
            return find_common_dtype(self.pairs)
        counts: Counter[torch.dtype] = Counter()
        for tensor in self.contents.stored.values():
            dtype = tensor.dtype if tensor.encoding in DTYPES else torch.bfloat16
            counts[dtype] += math.prod(tensor.shape)
        return counts.most_common(1)[0][0]

    @cached_property
    def pairs(self) -> list[TensorPair]:
        """Each tensor that the configuration asks for, and where it is stored, in that order.

        Raises CheckpointError unless all are there in their shape, and no others.
        """
        stored = {
            name: tensor
            for name, tensor in self.contents.stored.items()
            if not self.table.is_derived(name)
        }
        check_names(self.table, self.config, stored, where=self.where_config_is)
        return match_tensors(self.table.map_tensors(self.config), stored, folder=self.contents.path)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Recognise the checkpoint at `path`, a folder or a file, from headers alone.

    Raises CheckpointError if there is none, if there are several, or if a header is damaged.
    """
    path = Path(path)
    try:
        group = _find_group(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    stored = _merge_tables(group)
    layout = group.layout or _find_layout(stored, group.container)
    if layout is None:
        examples = sorted(stored)[:3]
        raise CheckpointError(
            f"{path}: no tensor is one of a Mistral or Mixtral, "
            f"{f'found {examples}' if examples else 'there are none at all'}"
        )
    folder = path if path.is_dir() else path.parent
    files = tuple(group.tables)
    contents = Contents(path, folder, group.container, files, stored, group.metadata)
    return Checkpoint(layout, layout.choose_table(stored), contents)


@dataclass(frozen=True)
class _Group:
    """Files that make one checkpoint together, perhaps with an index, and their headers."""

    container: Container
    layout: Layout | None
    tables: Mapping[Path, Mapping[str, StoredTensor]]
    metadata: Mapping[str, Any]
    index: Path | None = None

    def __str__(self) -> str:
        return str((self.index or next(iter(self.tables))).name)


def _find_group(path: Path) -> _Group:
    """The one group of files at `path` that can be a checkpoint."""
    if not path.exists():
        previous = find_previous(path.absolute())
        remedy = f"; a killed save left its previous version at {previous}" if previous else ""
        raise CheckpointError(f"{path} does not exist; looked for {_LOOKED_FOR}{remedy}")
    entries = [path]
    if path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    groups = _group_files(entries)
    if len(groups) > 1:
        raise CheckpointError(
            f"{path} holds {len(groups)} checkpoints ({', '.join(map(str, groups))}); name the one "
            "that is meant by its file, or move the others away"
        )
    if groups:
        return groups[0]
    _refuse_pickles(entries)
    if not path.is_dir():
        raise CheckpointError(f"{path} is none of {_LOOKED_FOR}")
    found = [entry.name for entry in entries[:8]]
    raise CheckpointError(
        f"{path} has no weights: looked for {_LOOKED_FOR}, "
        f"found {found if found else 'an empty folder'}"
    )


def _group_files(entries: Sequence[Path]) -> list[_Group]:
    """An index and its shards are a group; so are all other files of one container and layout."""
    groups = [_read_indexed(e) for e in entries if e.name.endswith(_INDEX_SUFFIX)]
    taken = {file for group in groups for file in group.tables}
    loose = {entry: _recognise(entry) for entry in entries if entry not in taken}
    if set(loose.values()) & {"safetensors", "gguf"} or groups:
        # A pickle beside weights that need no trust is what some uploads keep for old readers.
        loose = {entry: kind for entry, kind in loose.items() if kind != "torch"}
    for entry, container in loose.items():
        if container == "gguf":
            gguf = read_gguf(entry)
            groups.append(_Group("gguf", GGUF, {entry: gguf.tensors}, gguf.metadata))
    readers: dict[Container, Callable[[Path], dict[str, StoredTensor]]] = {
        "safetensors": read_table,
        "torch": read_torch_table,
    }
    for container, read in readers.items():
        tables = {entry: read(entry) for entry, kind in loose.items() if kind == container}
        groups += _group_by_layout(container, tables, has_others=bool(groups))
    return groups


def _read_indexed(index: Path) -> _Group:
    """The shards that an index names."""
    weight_map = read_index(index)
    tables = {shard: read_table(index.parent / shard) for shard in sorted(set(weight_map.values()))}
    check_index(weight_map, tables, index)
    by_path = {index.parent / shard: table for shard, table in tables.items()}
    return _Group("safetensors", None, by_path, {}, index)


def _group_by_layout(
    container: Container, tables: Mapping[Path, Mapping[str, StoredTensor]], *, has_others: bool
) -> list[_Group]:
    """One group for each layout that has files; files of none are looked at with the first.

    Beside a complete checkpoint, files of no layout (an adapter, say) are left alone.
    """
    by_layout: dict[str, dict[Path, Mapping[str, StoredTensor]]] = {}
    unknown = {}
    for path, table in tables.items():
        if layout := _find_layout(table, container):
            by_layout.setdefault(layout.name, {})[path] = table
        else:
            unknown[path] = table
    groups = [_Group(container, None, files, {}) for files in by_layout.values()]
    if not groups and unknown and not has_others:
        groups = [_Group(container, None, {}, {})]
    return [replace(g, tables={**g.tables, **unknown}) for g in groups[:1]] + groups[1:]


def _recognise(path: Path) -> Container | None:
    """What kind of file it is, by its first bytes; a safetensors file may be known by its name."""
    if path.is_dir():
        if path.suffix == ".safetensors":
            raise IsADirectoryError(f"{path} is a folder")
        return None
    with path.open("rb") as file:
        head = file.read(512)
    if head[:4] in (b"GGUF", b"FUGG"):
        return "gguf"
    if head[:4] == b"PK\x03\x04":  # a zip; torch.save writes NAME/data.pkl first
        return "torch" if b"/data.pkl" in head else None
    length = int.from_bytes(head[:8], "little")
    is_header = head[8:9] == b"{" and length <= path.stat().st_size - 8
    return "safetensors" if is_header or path.suffix == ".safetensors" else None


def _refuse_pickles(entries: Sequence[Path]) -> None:
    for entry in entries:
        if entry.suffix in _PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{entry} is a pickle of the old kind, which can run code when it is read; "
                f"tramontane reads {_LOOKED_FOR}: convert it first (transformers: save_pretrained)"
            )


def _merge_tables(group: _Group) -> dict[str, StoredTensor]:
    """All tensors of the group by name."""
    stored: dict[str, StoredTensor] = {}
    for table in group.tables.values():
        for name, tensor in table.items():
            if name in stored:
                raise CheckpointError(
                    f"{name} is in {stored[name].path.name} and in {tensor.path.name}; these files "
                    "do not belong together"
                )
            stored[name] = tensor
    return stored


def _find_layout(stored: Mapping[str, StoredTensor], container: Container) -> Layout | None:
    """The layout that knows most of the names, if any knows one."""

    def count(layout: Layout) -> int:
        return layout.choose_table(stored).count_matches(stored)

    best = max((known for known in LAYOUTS if container in known.containers), key=count)
    return best if count(best) else None
