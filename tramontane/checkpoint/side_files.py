"""What may lie beside the weights, and how large it may be: looked at before anybody reads it.

JSON takes many times its size when it is parsed. Most of these files have to be read within their
size and 16 MiB; a vocabulary of 128,000 tokens with its merges cannot be, it may take 1 GiB.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tramontane.bounded_json import check_memory
from tramontane.checkpoint.files.json_file import MAX_BYTES, check_size, read_small_file

_MAX_VOCABULARY = 64 * 2**20  # bytes; the largest of today have 35 million
_VOCABULARY_MEMORY = 2**30


class SideFile(NamedTuple):
    """A kind of file: what it holds, and what it may take. `memory` is None for its size."""

    what: str
    max_bytes: int = MAX_BYTES
    is_json: bool = True
    memory: int | None = None


_PIECES = SideFile("tokenizer", _MAX_VOCABULARY, is_json=False)
_NUMBERED_PIECES = "*.model.v[0-9]*"
_KINDS = {
    "tokenizer.json": SideFile("tokenizer", _MAX_VOCABULARY, memory=_VOCABULARY_MEMORY),
    "tokenizer.model": _PIECES,
    "chat_template.jinja": SideFile("chat template", is_json=False),
    "generation_config.json": SideFile("sampling defaults"),
    "training.json": SideFile("history of training"),
    "tokenizer_config.json": SideFile("settings of the tokenizer"),
    "special_tokens_map.json": SideFile("names of control tokens"),
}


def list_side_files(folder: Path) -> Iterator[tuple[Path, SideFile]]:
    """Those that are there."""
    for name, kind in _KINDS.items():
        if (path := folder / name).exists():
            yield path, kind
    for path in sorted(folder.glob(_NUMBERED_PIECES)):
        yield path, _PIECES


def check_side_files(folder: Path) -> None:
    """Raise CheckpointError if one of a folder's files is no regular file, or takes too much."""
    for path, kind in list_side_files(folder):
        check_size(path, max_bytes=kind.max_bytes)
        if kind.is_json:
            content = read_small_file(path, max_bytes=kind.max_bytes)
            check_memory(content, where=str(path), memory=kind.memory)
