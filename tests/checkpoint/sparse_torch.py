"""What torch.save writes for bf16 tensors, but with holes where their data would be."""

import io
import pickle
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch


class _Storage:
    """Stands for a storage of `count` values under `key`."""

    def __init__(self, key: str, count: int) -> None:
        self.key, self.count = key, count


class _Tensor:
    """Pickled as torch pickles a contiguous tensor."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        arguments = (self.storage, 0, self.shape, stride, False, {})
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", torch.BFloat16Storage, value.key, "cpu", value.count)
        return None


def write_sparse_torch(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A zip as torch writes it; members hold no bytes on disk."""
    state = {
        name: _Tensor(_Storage(str(index), prod(shape)), shape)
        for index, (name, shape) in enumerate(shapes.items())
    }
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(state)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr("consolidated/data.pkl", pickled.getvalue())
        archive.writestr("consolidated/byteorder", "little")
        for index, shape in enumerate(shapes.values()):
            _add_hole(archive, f"consolidated/data/{index}", 2 * prod(shape))
        archive.writestr("consolidated/version", "3\n")


def _add_hole(archive: zipfile.ZipFile, name: str, size: int) -> None:
    """A member whose data is never written; its checksum is nobody's."""
    member = zipfile.ZipInfo(name)
    member.file_size = member.compress_size = size
    member.CRC = 0
    file: Any = archive.fp
    file.seek(archive.start_dir)
    member.header_offset = file.tell()
    file.write(member.FileHeader(zip64=True))
    file.seek(size, 1)
    archive.start_dir = file.tell()
    archive.filelist.append(member)
    archive.NameToInfo[name] = member
    archive._didModify = True  # type: ignore[attr-defined]
