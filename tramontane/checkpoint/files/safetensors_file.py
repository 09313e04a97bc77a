"""One safetensors file: a checked table of contents, tensors as views of the mapped file.

The format is 8 bytes with the length of a JSON header, the header (name -> dtype, shape, begin and
end of its bytes), and the bytes. Everything in the header is checked before any of it is used.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from tramontane.bounded_json import ALLOWANCE, parse_json
from tramontane.checkpoint.files.stored_tensor import DTYPE_NAMES, DTYPES, UNPACKED, StoredTensor
from tramontane.checkpoint.files.untrusted import MAX_RANK, check_name, is_countable, shorten
from tramontane.errors import CheckpointError

_ALIGNMENT = 64  # of the first tensor: a cache line, so that mapped values suit every kernel
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_PARSED_BYTES = 2**28  # of the file's size, to be taken by its header: some 100,000 tensors
_METADATA = "__metadata__"


class _File(NamedTuple):
    path: Path
    num_bytes: int


def read_table(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name; no weight is read.

    Raises CheckpointError, naming file, tensor and reason, on anything that the format forbids.
    """
    file = _File(path, path.stat().st_size)
    with path.open("rb") as handle:
        header, data_begin = _read_header(handle, file)
    tensors = {
        name: _check_entry(name, entry, file=file, data_begin=data_begin)
        for name, entry in header.items()
    }
    _check_coverage(sorted(tensors.values(), key=lambda t: (t.begin, t.end)), file, data_begin)
    return tensors


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    build: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    exceptions: Mapping[str, torch.dtype] = {},
) -> None:
    """Write a safetensors file in the order of `shapes`; `build` gives the values, one at a time.

    All are of `dtype`, or of what `exceptions` has for their name. Raises CheckpointError on a
    dtype that `read_table` would refuse.
    """
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{path}: cannot store {dtype}; known are {sorted(DTYPES)}")
    with path.open("wb") as handle:
        tensors = {n: (tuple(shape), exceptions.get(n, dtype)) for n, shape in shapes.items()}
        handle.write(encode_header(tensors))
        for name, expected in tensors.items():
            values = build(name)
            assert (values.shape, values.dtype) == expected, (name, expected)
            _write_values(handle, values)


def encode_header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    """The beginning of a file that holds tensors of these shapes and dtypes, one after another.

    Its size is a multiple of 64 bytes: so lies each tensor if the sizes of those before it are.
    """
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        entry = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape)}
        header[name] = entry | {"data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def _write_values(handle: BinaryIO, tensor: Tensor) -> None:
    handle.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _read_header(handle: BinaryIO, file: _File) -> tuple[dict[str, Any], int]:
    """The header and the position at which the data begins."""
    if file.num_bytes < 8:
        raise CheckpointError(
            f"{file.path} has {file.num_bytes} bytes, not even a header; incomplete download?"
        )
    length = int.from_bytes(handle.read(8), "little")
    if length > min(file.num_bytes - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file.path}: the header claims {length:,} bytes, the file has {file.num_bytes:,}; "
            "incomplete download, or not a safetensors file?"
        )
    where = f"the header of {file.path}"
    memory = min(file.num_bytes, _MAX_PARSED_BYTES) + ALLOWANCE
    header = parse_json(handle.read(length), where=where, memory=memory)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(type(v) is str for v in metadata.values()):
        raise CheckpointError(f"{where}: {_METADATA} is no map of strings: a damaged file?")
    return header, 8 + length


def _check_entry(name: str, entry: Any, *, file: _File, data_begin: int) -> StoredTensor:
    where = f"{file.path}: {check_name(name, where=f'{file.path}: the name of a tensor')}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its entry is not one of dtype, shape and data_offsets")
    dtype = _check_dtype(entry["dtype"], where=where)
    shape = _check_sizes(entry["shape"], where=f"{where}: shape", max_count=MAX_RANK)
    if not is_countable(shape):
        raise CheckpointError(f"{where}: shape {shorten(entry['shape'])} is beyond any file")
    offsets = _check_sizes(entry["data_offsets"], where=f"{where}: data_offsets", max_count=2)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets {shorten(entry['data_offsets'])} are not begin and end"
        )
    begin, end = data_begin + offsets[0], data_begin + offsets[1]
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise CheckpointError(
            f"{where}: {entry['dtype']} of shape {list(shape)} needs {needed:,} bytes, "
            f"data_offsets give it {end - begin:,}"
        )
    if end > file.num_bytes:
        raise CheckpointError(
            f"{where} ends at byte {end:,}, but the file has {file.num_bytes:,}: "
            f"{end - file.num_bytes:,} bytes are missing; incomplete download?"
        )
    return StoredTensor(name, file.path, dtype, shape, begin, end)


def _check_dtype(value: Any, *, where: str) -> torch.dtype:
    if not isinstance(value, str) or value not in UNPACKED:
        raise CheckpointError(
            f"{where}: dtype {shorten(value)} is not supported; known are {sorted(DTYPES)}"
        )
    return UNPACKED[value]


def _check_sizes(values: Any, *, where: str, max_count: int) -> tuple[int, ...]:
    """A short list of whole numbers, zero or more."""
    is_list = isinstance(values, list) and len(values) <= max_count
    if not is_list or not all(type(value) is int and value >= 0 for value in values):
        raise CheckpointError(
            f"{where} is {shorten(values)}; at most {max_count} whole numbers belong there"
        )
    return tuple(values)


def _check_coverage(tensors: Sequence[StoredTensor], file: _File, data_begin: int) -> None:
    """Tensors have to follow one another without hole or overlap and to end with the file."""
    position, last = data_begin, "the header"
    for tensor in tensors:
        if tensor.begin != position:
            fault = "overlaps" if tensor.begin < position else "leaves a hole after"
            raise CheckpointError(f"{tensor.place} {fault} {last} (at byte {tensor.begin:,})")
        position, last = tensor.end, tensor.name
    if position != file.num_bytes:
        raise CheckpointError(
            f"{file.path}: {last} ends at byte {position:,}, but the file has {file.num_bytes:,}: "
            f"{file.num_bytes - position:,} bytes belong to no tensor; download it again"
        )
