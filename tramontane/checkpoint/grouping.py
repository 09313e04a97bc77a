"""Which files at a path make one checkpoint, told by their first bytes and their headers.

An index and its shards belong together, so do the parts of a split GGUF, and so do all other files
of one kind and layout. Only regular files are opened: a pipe could wait for ever.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tramontane.checkpoint.files.gguf_file import GgufFile, read_gguf
from tramontane.checkpoint.files.gguf_split import find_siblings, join_parts, read_split
from tramontane.checkpoint.files.safetensors_file import read_table
from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.checkpoint.files.torch_file import read_torch_table
from tramontane.checkpoint.files.untrusted import require_regular
from tramontane.checkpoint.hf import check_index, read_index
from tramontane.checkpoint.layout import Container, Layout
from tramontane.errors import CheckpointError

LOOKED_FOR = "safetensors, GGUF, or torch archives (consolidated.00.pt)"
INDEX_SUFFIX = ".safetensors.index.json"
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

Table = Mapping[str, StoredTensor]
FindLayout = Callable[[Table, Container], Layout | None]


@dataclass(frozen=True)
class FileGroup:
    """Files that make one checkpoint together, perhaps with an index, and their headers."""

    container: Container
    tables: Mapping[Path, Table]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    index: Path | None = None

    def __str__(self) -> str:
        return str((self.index or next(iter(self.tables))).name)

    def merge(self) -> dict[str, StoredTensor]:
        """All tensors by name. Raises CheckpointError if one is in two files."""
        stored: dict[str, StoredTensor] = {}
        for table in self.tables.values():
            for name, tensor in table.items():
                if name in stored:
                    raise CheckpointError(
                        f"{name} is in {stored[name].path.name} and in {tensor.path.name}; these "
                        "files do not belong together"
                    )
                stored[name] = tensor
        return stored


def find_group(path: Path, *, find_layout: FindLayout) -> FileGroup | None:
    """The group of files at `path`, a folder or one of the files, None if nothing holds weights.

    Raises CheckpointError if there are several, if one is not whole or damaged, and on a pickle of
    the old kind; OSError if something cannot be read.
    """
    entries = list_entries(path) if path.is_dir() else [path]
    groups = _group_files(entries, find_layout)
    if len(groups) > 1:
        raise CheckpointError(
            f"{path} holds {len(groups)} checkpoints ({', '.join(map(str, groups))}); name the one "
            "that is meant by its file, or move the others away"
        )
    if not groups:
        _refuse_pickles(entries)
    return groups[0] if groups else None


def list_entries(folder: Path) -> list[Path]:
    """What lies in a folder, hidden files left out."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def recognize(path: Path) -> Container | None:
    """What kind of file it is, by its first bytes; a safetensors file may be known by its name.

    Raises CheckpointError if it is no regular file; folders are nothing, unless called so.
    """
    if path.is_dir() and path.suffix != ".safetensors":
        return None
    num_bytes = require_regular(path).st_size
    with path.open("rb") as file:
        head = file.read(512)
    if head[:4] in (b"GGUF", b"FUGG"):
        return "gguf"
    if head[:4] == b"PK\x03\x04":  # a zip; torch.save writes NAME/data.pkl first
        return "torch" if b"/data.pkl" in head else None
    is_header = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= num_bytes - 8
    return "safetensors" if is_header or path.suffix == ".safetensors" else None


def _group_files(entries: Sequence[Path], find_layout: FindLayout) -> list[FileGroup]:
    groups = [_read_indexed(e) for e in entries if e.name.endswith(INDEX_SUFFIX)]
    taken = {file for group in groups for file in group.tables}
    loose = {entry: recognize(entry) for entry in entries if entry not in taken}
    if set(loose.values()) & {"safetensors", "gguf"} or groups:
        # A pickle beside weights that need no trust is what some uploads keep for old readers.
        loose = {entry: kind for entry, kind in loose.items() if kind != "torch"}
    groups += _group_gguf([entry for entry, kind in loose.items() if kind == "gguf"])
    readers: dict[Container, Callable[[Path], dict[str, StoredTensor]]] = {
        "safetensors": read_table,
        "torch": read_torch_table,
    }
    for container, read in readers.items():
        tables = {entry: read(entry) for entry, kind in loose.items() if kind == container}
        has_others = bool(groups)
        groups += _group_by_layout(container, tables, find_layout, has_others=has_others)
    return groups


def _read_indexed(index: Path) -> FileGroup:
    """The shards that an index names."""
    weight_map = read_index(index)
    tables = {shard: read_table(index.parent / shard) for shard in sorted(set(weight_map.values()))}
    check_index(weight_map, tables, index)
    by_path = {index.parent / shard: table for shard, table in tables.items()}
    return FileGroup("safetensors", by_path, index=index)


def _group_gguf(paths: Sequence[Path]) -> list[FileGroup]:
    """Whole files, and split ones by what they are parts of; to name one part is to name all."""
    files = {path: read_gguf(path) for path in paths}
    if len(files) == 1:
        (path, file) = next(iter(files.items()))
        if read_split(path, file) is not None:
            others = [o for o in find_siblings(path, file) if recognize(o) == "gguf"]
            files |= {other: read_gguf(other) for other in others}
            files = _keep_same_split(files, path)
    return [
        FileGroup("gguf", {part: file.tensors for part, file in parts.items()}, metadata)
        for parts, metadata in join_parts(files)
    ]


def _keep_same_split(files: Mapping[Path, GgufFile], path: Path) -> dict[Path, GgufFile]:
    """The files that say they are parts of as many, with as many tensors, as `path` says."""
    wanted = read_split(path, files[path])
    assert wanted is not None, path
    splits = {other: read_split(other, file) for other, file in files.items()}
    return {
        other: files[other] for other, split in splits.items() if split and split[1:] == wanted[1:]
    }


def _group_by_layout(
    container: Container,
    tables: Mapping[Path, Table],
    find_layout: FindLayout,
    *,
    has_others: bool,
) -> list[FileGroup]:
    """One group for each layout that has files; files of none are looked at with the first.

    Beside a complete checkpoint, files of no layout (an adapter, say) are left alone.
    """
    by_layout: dict[str, dict[Path, Table]] = {}
    unknown = {}
    for path, table in tables.items():
        if layout := find_layout(table, container):
            by_layout.setdefault(layout.name, {})[path] = table
        else:
            unknown[path] = table
    groups = [FileGroup(container, files) for files in by_layout.values()]
    if not groups and unknown and not has_others:
        groups = [FileGroup(container, {})]
    return [replace(g, tables={**g.tables, **unknown}) for g in groups[:1]] + groups[1:]


def _refuse_pickles(entries: Sequence[Path]) -> None:
    for entry in entries:
        if entry.suffix in _PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{entry} is a pickle of the old kind, which can run code when it is read; "
                f"tramontane reads {LOOKED_FOR}: convert it first (transformers: save_pretrained)"
            )
