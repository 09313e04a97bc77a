"""A GGUF that llama.cpp's gguf-split cut into files: which parts there have to be, put together.

Each part says split.no (from 0), split.count and split.tensors.count; the first has the metadata.
Names such as m-00001-of-00002.gguf are usual, and help where several lie in one folder.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tramontane.checkpoint.files.gguf_file import GgufFile
from tramontane.checkpoint.files.untrusted import shorten
from tramontane.errors import CheckpointError

_MAX_PARTS = 10_000
_NAME = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")


class Split(NamedTuple):
    """Which part it is, of how many, that have how many tensors together."""

    number: int
    num_parts: int
    num_tensors: int


def read_split(path: Path, file: GgufFile) -> Split | None:
    """What a file says of itself as a part; None if it is whole. Raises CheckpointError."""
    values = [file.metadata.get(f"split.{key}", 0) for key in ("no", "count", "tensors.count")]
    if not all(type(value) is int for value in values):
        raise CheckpointError(f"{path}: split.no, .count and .tensors.count are {shorten(values)}")
    split = Split(*values)
    if split.num_parts <= 1:
        return None
    if not 0 <= split.number < split.num_parts <= _MAX_PARTS:
        raise CheckpointError(
            f"{path}: split.no is {split.number:,} and split.count {split.num_parts:,}; parts "
            f"count from 0, and at most {_MAX_PARTS:,} are read"
        )
    return split


def find_siblings(path: Path, file: GgufFile) -> list[Path]:
    """Files beside a part that may be others: those of its name, or all if that is not usual."""
    match, split = _NAME.fullmatch(path.name), read_split(path, file)
    assert split is not None, path
    if match is None:
        files = (o for o in path.parent.iterdir() if not o.name.startswith(".") and o.is_file())
        return sorted(other for other in files if other != path)
    numbers = range(split.num_parts)
    parts = (path.with_name(_name_part(match["stem"], n, split.num_parts)) for n in numbers)
    return [part for part in parts if part.is_file()]


def join_parts(
    files: Mapping[Path, GgufFile],
) -> Iterator[tuple[dict[Path, GgufFile], dict[str, Any]]]:
    """The files of each model, in order, and its metadata.

    Raises CheckpointError if parts are missing, naming them, or there twice.
    """
    series: dict[tuple[str, int, int], dict[int, Path]] = {}
    for path, file in files.items():
        split = read_split(path, file)
        if split is None:
            yield {path: file}, file.metadata
            continue
        match = _NAME.fullmatch(path.name)
        key = (match["stem"] if match else "", split.num_parts, split.num_tensors)
        other = series.setdefault(key, {}).setdefault(split.number, path)
        if other != path:
            raise CheckpointError(
                f"{path.name} and {other.name} are both part {split.number + 1} of "
                f"{split.num_parts}; keep one of them in {path.parent}"
            )
    for (stem, count, num_tensors), parts in series.items():
        _check_whole(parts, count, stem=stem)
        whole = {parts[number]: files[parts[number]] for number in range(count)}
        found = sum(len(file.tensors) for file in whole.values())
        if found != num_tensors:
            raise CheckpointError(
                f"{parts[0]}: split.tensors.count is {num_tensors:,}, but the {count} parts have "
                f"{found:,} tensors; these files do not belong together"
            )
        yield whole, files[parts[0]].metadata


def _check_whole(parts: Mapping[int, Path], count: int, *, stem: str) -> None:
    absent = [number for number in range(count) if number not in parts]
    if absent:
        names = [
            _name_part(stem, number, count) if stem else f"part {number + 1} of {count}"
            for number in absent
        ]
        more = f" and {len(names) - 50} more" if len(names) > 50 else ""
        raise CheckpointError(
            f"{next(iter(parts.values())).parent} lacks {', '.join(names[:50])}{more}; incomplete "
            "download?"
        )


def _name_part(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"
