"""One GGUF file, version 2 or 3: its metadata, and a checked table of its tensors.

The format is a magic word, a version, two counts, the metadata (key, type, value), the tensors
(name, dimensions, type, offset), padding up to an alignment, and the data. Nothing is allocated
before the bytes that it stands for are known to be in the file; no tensor is read.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
import torch

from tramontane.checkpoint.files.gguf_cursor import GgufCursor
from tramontane.checkpoint.files.gguf_values import OTHER_PACKINGS, PACKINGS, PackedTensor, Packing
from tramontane.checkpoint.files.stored_tensor import DTYPES, StoredTensor
from tramontane.checkpoint.files.untrusted import MAX_BYTES, check_name, shorten
from tramontane.errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_KEYS = 2**16
_MAX_TENSORS = 2**17
_MAX_DIMS = 4  # GGML's own limit
_MAX_ALIGNMENT = 2**16
_DEFAULT_ALIGNMENT = 32
_KEY_MEMORY, _TENSOR_MEMORY = 256, 1024  # bytes of an entry, its name included
_MIN_KEY_BYTES = 13  # length of the key, type, a value of one byte
_MIN_TENSOR_BYTES = 32  # length of the name, rank, one dimension, type, offset

_U32 = Struct("<I")
_HEADER = Struct("<4sIQQ")
_ARRAY_HEADER = Struct("<IQ")
_PLACE = Struct("<IQ")
_DIMS = {rank: Struct(f"<{rank}Q") for rank in range(1, _MAX_DIMS + 1)}
# Types of values by their number in the file.
_SCALARS = dict(enumerate(map(Struct, "<B <b <H <h <I <i <f <B".split()))) | dict(
    zip((10, 11, 12), map(Struct, ("<Q", "<q", "<d")), strict=True)
)
_ARRAY_DTYPES = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says. Arrays are lists of strings or NumPy arrays of numbers.

    Shapes are in torch's order, the slowest dimension first: the reverse of what the file has.
    """

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _TensorEntry(NamedTuple):
    """A tensor as its entry describes it; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    packing: Packing
    num_bytes: int
    offset: int


def read_gguf(path: Path) -> GgufFile:
    """The header of a GGUF file; no weight is read.

    Raises CheckpointError, naming file, key or tensor, and reason, on anything that the format or
    GGML forbids, on big-endian files, and on types of tensors that are not supported.
    """
    with path.open("rb") as handle:
        _check_magic(handle.read(_HEADER.size), path)
        with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_header(GgufCursor(data, path))


def _check_magic(start: bytes, path: Path) -> None:
    if start[:4] == _MAGIC[::-1]:
        raise CheckpointError(f"{path} is big-endian; get or convert the little-endian file")
    if start[:4] != _MAGIC[: len(start)]:
        raise CheckpointError(
            f"{path} starts with {shorten(start[:4].decode('latin-1'))}, not with 'GGUF': "
            "not a GGUF file, or an incomplete download"
        )
    if len(start) < _HEADER.size:
        raise CheckpointError(
            f"{path} has {len(start)} bytes, not even a header; incomplete download?"
        )
    version = _U32.unpack_from(start, 4)[0]
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(
            f"{path} is big-endian (version {version:#x}); get or convert the little-endian file"
        )
    if version not in _VERSIONS:
        raise CheckpointError(
            f"{path} is GGUF version {version}; 2 and 3 are read: convert it again with the "
            "present llama.cpp"
        )


def _read_header(cursor: GgufCursor) -> GgufFile:
    _, version, num_tensors, num_keys = cursor.take(_HEADER, "the header")
    for what, count, most, item_bytes in (
        ("the metadata", num_keys, _MAX_KEYS, _MIN_KEY_BYTES),
        ("the table of tensors", num_tensors, _MAX_TENSORS, _MIN_TENSOR_BYTES),
    ):
        cursor.check_count(count, item_bytes, what)
        if count > most:
            raise cursor.fail(what, f"has {count:,} entries; at most {most:,} are read")
    metadata = _read_metadata(cursor, num_keys)
    alignment = _check_alignment(metadata.get("general.alignment", _DEFAULT_ALIGNMENT), cursor)
    entries = _read_entries(cursor, num_tensors)
    data_begin = -(-cursor.position // alignment) * alignment
    tensors = {
        entry.name: _place_tensor(entry, cursor, data_begin=data_begin, alignment=alignment)
        for entry in entries
    }
    _check_overlap(sorted(tensors.values(), key=lambda t: t.begin))
    return GgufFile(version, metadata, tensors)


def _read_metadata(cursor: GgufCursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        what = f"key {index} of {count}"
        cursor.charge(_KEY_MEMORY, what)
        key = check_name(cursor.take_string(what), where=f"{cursor.path}: {what}")
        if key in metadata:
            raise cursor.fail(key, "is there twice in the metadata")
        metadata[key] = _read_value(cursor, cursor.take(_U32, key)[0], key)
    return metadata


def _read_value(cursor: GgufCursor, kind: int, key: str) -> Any:
    if kind == _STRING:
        return cursor.take_string(key)
    if kind == _ARRAY:
        return _read_array(cursor, key)
    if kind not in _SCALARS:
        raise cursor.fail(key, f"has values of type {kind}, which does not exist")
    value = cursor.take(_SCALARS[kind], key)[0]
    if kind != _BOOL:
        return value
    if value > 1:
        raise cursor.fail(key, f"is a bool of value {value}; 0 and 1 exist")
    return bool(value)


def _read_array(cursor: GgufCursor, key: str) -> list[str] | np.ndarray:
    kind, count = cursor.take(_ARRAY_HEADER, key)
    if kind == _STRING:
        return cursor.take_strings(count, key)
    if kind == _ARRAY:
        raise cursor.fail(key, "is an array of arrays, which GGML does not read either")
    if kind not in _ARRAY_DTYPES:
        raise cursor.fail(key, f"is an array of type {kind}, which does not exist")
    dtype = np.dtype(_ARRAY_DTYPES[kind])
    cursor.check_count(count, dtype.itemsize, key)
    cursor.charge(count * dtype.itemsize, key)
    values = np.frombuffer(cursor.take_bytes(count * dtype.itemsize, key), dtype=dtype)
    if kind != _BOOL:
        return values
    if values.size and values.max() > 1:
        raise cursor.fail(key, f"has a bool of value {values.max()}; 0 and 1 exist")
    return values.view(np.bool_)


def _check_alignment(value: Any, cursor: GgufCursor) -> int:
    is_power = type(value) is int and value > 0 and value & (value - 1) == 0
    if not is_power or value > _MAX_ALIGNMENT:
        raise cursor.fail(
            "general.alignment",
            f"is {shorten(value)}; a power of two up to {_MAX_ALIGNMENT:,} belongs there",
        )
    return value


def _read_entries(cursor: GgufCursor, count: int) -> list[_TensorEntry]:
    entries, names = [], set()
    for index in range(count):
        cursor.charge(_TENSOR_MEMORY, f"tensor {index} of {count}")
        entry = _read_entry(cursor, f"tensor {index} of {count}")
        if entry.name in names:
            raise cursor.fail(entry.name, "is there twice in the table of tensors")
        names.add(entry.name)
        entries.append(entry)
    return entries


def _read_entry(cursor: GgufCursor, what: str) -> _TensorEntry:
    name = check_name(cursor.take_string(what), where=f"{cursor.path}: the name of {what}")
    rank = cursor.take(_U32, name)[0]
    if rank not in _DIMS:
        raise cursor.fail(name, f"has {rank:,} dimensions; 1 to {_MAX_DIMS} are possible")
    shape = tuple(reversed(cursor.take(_DIMS[rank], name)))
    number, offset = cursor.take(_PLACE, name)
    if number not in PACKINGS:
        kind = OTHER_PACKINGS.get(number, "which does not exist")
        known = ", ".join(packing.name for packing in PACKINGS.values())
        raise cursor.fail(name, f"has type {number} ({kind}), which is not supported; are: {known}")
    packing = PACKINGS[number]
    if 0 in shape or max(math.prod(shape), offset) > MAX_BYTES:
        raise cursor.fail(name, f"has shape {list(shape)} at offset {offset:,}: no file has that")
    if shape[-1] % packing.block_size:
        raise cursor.fail(
            name,
            f"has rows of {shape[-1]:,} values, not a multiple of the {packing.block_size} of a "
            f"{packing.name} block",
        )
    num_bytes = math.prod(shape) // packing.block_size * packing.block_bytes
    return _TensorEntry(name, shape, packing, num_bytes, offset)


def _place_tensor(
    entry: _TensorEntry, cursor: GgufCursor, *, data_begin: int, alignment: int
) -> StoredTensor:
    name, shape, packing, num_bytes, offset = entry
    if offset % alignment:
        raise cursor.fail(name, f"has offset {offset:,}, not a multiple of {alignment}")
    begin = data_begin + offset
    end = begin + num_bytes
    if end > cursor.num_bytes:
        raise cursor.fail(
            name,
            f"({packing.name}, {list(shape)}) ends at byte {end:,}, but the file has "
            f"{cursor.num_bytes:,}: {end - cursor.num_bytes:,} bytes are missing; "
            "incomplete download?",
        )
    if packing.name in DTYPES:
        return StoredTensor(name, cursor.path, DTYPES[packing.name], shape, begin, end)
    return PackedTensor(name, cursor.path, torch.float32, shape, begin, end, packing)


def _check_overlap(tensors: Sequence[StoredTensor]) -> None:
    for before, after in pairwise(tensors):
        if after.begin < before.end:
            raise CheckpointError(
                f"{after.place} starts at byte {after.begin:,}, inside of {before.name}, which "
                f"ends at {before.end:,}: a damaged file"
            )
