"""One torch.save archive (*.pt, *.pth, *.bin since torch 1.6), read without running any of it.

The archive is a zip: `<prefix>/data.pkl` describes the tensors, `<prefix>/data/<key>` are their
values. The description is followed symbolically (`torch_pickle`); torch never sees it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tramontane.bounded_json import ALLOWANCE
from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.checkpoint.files.torch_pickle import REMEDY, TensorView, follow_pickle
from tramontane.checkpoint.files.untrusted import MAX_BYTES, check_name, shorten
from tramontane.checkpoint.files.zip_file import Member, read_members
from tramontane.errors import CheckpointError

_MAX_PICKLE_BYTES = 2**26
_MAX_NOTE_BYTES = 64  # of `version` and `byteorder`
_MAX_VERSION = 10  # of the archive, in torch 2
_DESCRIPTION = "data.pkl"
_SCRIPT_MEMBERS = ("constants.pkl", "code/")  # TorchScript: programs
_OTHER_FILES = {
    b"\x80": "a bare pickle (torch.save before 1.6, or with the old serialization)",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "compressed with gzip",
    b"version https://git-lfs": "the pointer of Git LFS instead of the file",
}
_TAR_MAGIC = b"ustar"


def read_torch_table(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict that torch.save wrote, by name; no weight is read.

    Raises CheckpointError, naming file, tensor or opcode, and reason, on all but a plain dict of
    contiguous fp32, fp16 or bf16 tensors. Two names may share their values.
    """
    with path.open("rb", buffering=0) as handle:
        _check_kind(handle.read(512), path)
        members = read_members(handle, path)
        prefix = _find_prefix(members, path)
        _check_notes(handle, members, prefix=prefix, path=path)
        pickle = _read_member(handle, members[prefix + _DESCRIPTION], _MAX_PICKLE_BYTES, path)
    memory = path.stat().st_size + ALLOWANCE
    state = follow_pickle(pickle, where=f"{path}: {_DESCRIPTION}", memory=memory)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict; {REMEDY}")
    return {
        name: _find_tensor(name, view, members=members, prefix=prefix, path=path)
        for name, view in state.items()
    }


def _check_kind(start: bytes, path: Path) -> None:
    """Refuse what is no zip, and say what it is."""
    if start.startswith(b"PK\3\4"):
        return
    if not start:
        raise CheckpointError(f"{path} has 0 bytes; incomplete download?")
    kinds = [kind for magic, kind in _OTHER_FILES.items() if start.startswith(magic)]
    if start[257:262] == _TAR_MAGIC:
        kinds = ["a tar archive (of downloaded files, or torch.save before 0.1.10)"]
    kind = kinds[0] if kinds else f"unknown (starts with {shorten(start[:8].decode('latin-1'))})"
    raise CheckpointError(f"{path} is not a torch.save archive of today, but {kind}; {REMEDY}")


def _find_prefix(members: Mapping[str, Member], path: Path) -> str:
    """The folder of the archive in which the one description lies, with its slash."""
    found = [name for name in members if name.count("/") == 1 and name.endswith("/" + _DESCRIPTION)]
    if len(found) != 1:
        raise CheckpointError(
            f"{path} has {len(found)} members <folder>/{_DESCRIPTION}, a torch.save archive has "
            f"one; found {shorten(list(members))}"
        )
    prefix = found[0].removesuffix(_DESCRIPTION)
    scripts = tuple(prefix + name for name in _SCRIPT_MEMBERS)
    if programs := [name for name in members if name.startswith(scripts)]:
        raise CheckpointError(
            f"{path} is a TorchScript archive, a program ({programs[0]}); {REMEDY}"
        )
    return prefix


def _check_notes(
    handle: BinaryIO, members: Mapping[str, Member], *, prefix: str, path: Path
) -> None:
    """`byteorder` has to be little, `version` one that is known, if they are there."""
    notes = {
        name: _read_member(handle, members[prefix + name], _MAX_NOTE_BYTES, path).strip()
        for name in ("byteorder", "version")
        if prefix + name in members
    }
    order, version = notes.get("byteorder", b"little"), notes.get("version", b"3")
    if order != b"little":
        raise CheckpointError(
            f"{path}: byteorder is {shorten(order.decode('latin-1'))}; only little is read: save "
            "the weights again on a machine that is little-endian"
        )
    if not (version.isdigit() and 1 <= int(version) <= _MAX_VERSION):
        raise CheckpointError(
            f"{path}: the version of the archive is {shorten(version.decode('latin-1'))}; "
            f"1 to {_MAX_VERSION} are known"
        )


def _read_member(handle: BinaryIO, member: Member, most: int, path: Path) -> bytes:
    if member.end - member.begin > most:
        raise CheckpointError(
            f"{path}: {member.name} has {member.end - member.begin:,} bytes; no model needs more "
            f"than {most:,} there"
        )
    handle.seek(member.begin)
    return handle.read(member.end - member.begin)


def _find_tensor(
    name: str, view: Any, *, members: Mapping[str, Member], prefix: str, path: Path
) -> StoredTensor:
    """Where the values of a view lie, after its claims were compared with the archive."""
    where = f"{path}: {check_name(name, where=f'{path}: the name of a tensor')}"
    if not isinstance(view, TensorView):
        raise CheckpointError(
            f"{where} is a {type(view).__name__}, not a tensor; save the model's state dict alone"
        )
    storage = view.storage
    member = members.get(f"{prefix}data/{storage.key}")
    if member is None:
        raise CheckpointError(
            f"{where}: its storage {shorten(storage.key)} is not in the archive; a damaged file"
        )
    item, size = storage.dtype.itemsize, member.end - member.begin
    if storage.num_values * item != size:
        raise CheckpointError(
            f"{where}: its storage should have {storage.num_values:,} values of {item} bytes, but "
            f"{member.name} has {size:,} bytes"
        )
    if not _is_contiguous(view):
        raise CheckpointError(
            f"{where} is not contiguous (shape {list(view.shape)}, strides {list(view.strides)}); "
            "call .contiguous() before it is saved"
        )
    num_values = math.prod(view.shape)
    if view.offset + num_values > storage.num_values:
        raise CheckpointError(
            f"{where}: shape {list(view.shape)} at offset {view.offset:,} needs more than the "
            f"{storage.num_values:,} values of its storage"
        )
    begin = member.begin + view.offset * item
    end = begin + num_values * item
    return StoredTensor(name, path, storage.dtype, view.shape, begin, end)


def _is_contiguous(view: TensorView) -> bool:
    """Whether the values lie in order; dimensions of one value may have any stride."""
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in view.shape
        expected = min(expected * size, MAX_BYTES)
    return True
