"""The table of contents of a zip archive whose members are stored as they are, for mapping.

PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 and 4.5.3 (zip64: torch archives have many gigabytes).
Zips that two readers could understand differently are refused: the directory has to end the file,
and what it says of a member must agree with what stands before the member's bytes.
"""

from collections.abc import Iterable
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO, NamedTuple

from tramontane.bounded_json import ALLOWANCE
from tramontane.checkpoint.files.untrusted import check_name
from tramontane.errors import CheckpointError

_MAX_MEMBERS = 2**17
_MAX_DIRECTORY_BYTES = 2**26
_MEMBER_MEMORY = 640  # bytes that an entry of the directory takes, beside its name
# Signature, 4 numbers of disks and counts, size and offset of the directory, length of a comment.
_END = Struct("<4s4HIIH")
# Signature, disk, offset of the zip64 end, number of disks.
_LOCATOR = Struct("<4sIQI")
# Signature, size, 2 versions, 2 disks, 2 counts, size and offset of the directory.
_END_64 = Struct("<4sQHHIIQQQQ")
# Signature, 2 versions, flags, method, time, date, CRC, packed size, size, lengths of name, extra
# and comment, disk, 2 attributes, offset of the local header.
_ENTRY = Struct("<4s6H3I5HII")
# Signature, version, flags, method, time, date, CRC, packed size, size, lengths of name and extra.
_LOCAL = Struct("<4s5H3IHH")
_EXTRA = Struct("<HH")
_ZIP64_ID = 1
_FULL_16, _FULL_32 = 2**16 - 1, 2**32 - 1  # "the value is in the zip64 part"
_HAS_DESCRIPTOR, _IS_UTF8 = 1 << 3, 1 << 11


class _Archive(NamedTuple):
    """The file that is read."""

    handle: BinaryIO
    path: Path
    num_bytes: int

    def read(self, begin: int, count: int) -> bytes:
        """Bytes at a position; fewer where the file ends, none beyond."""
        if not 0 <= begin < self.num_bytes:
            return b""
        self.handle.seek(begin)
        return self.handle.read(count)


class Member(NamedTuple):
    """A member of an archive; its bytes are those from `begin` to `end` of the file."""

    name: str
    begin: int
    end: int


class _Entry(NamedTuple):
    """A member as the directory describes it; `name` as it stands there."""

    name: bytes
    flags: int
    size: int
    offset: int


def read_members(handle: BinaryIO, path: Path) -> dict[str, Member]:
    """The members by name. Raises CheckpointError on anything but plain, disjoint, stored bytes."""
    archive = _Archive(handle, path, handle.seek(0, 2))
    directory, begin, count = _read_directory(archive)
    members, position, last = {}, 0, "the start"
    for entry in sorted(_parse_entries(directory, count, path), key=lambda entry: entry.offset):
        member = _find_member(archive, entry)
        where = f"{path}: {member.name}"
        if member.name in members:
            raise CheckpointError(f"{where} is there twice")
        if entry.offset < position:
            raise CheckpointError(f"{where} overlaps {last} (at byte {entry.offset:,})")
        if member.end > begin:
            raise CheckpointError(
                f"{where} ends at byte {member.end:,}, past the {begin:,} where the directory of "
                "the archive is: a damaged file"
            )
        members[member.name] = member
        position, last = member.end, member.name
    return members


def _read_directory(archive: _Archive) -> tuple[bytes, int, int]:
    """The directory, its position, and the number of its entries."""
    path, position = archive.path, archive.num_bytes - _END.size
    end = archive.read(position, _END.size)
    if not end.startswith(b"PK\5\6") or len(end) != _END.size or end[-2:] != b"\0\0":
        raise CheckpointError(
            f"{path} does not end with the directory of a zip archive (it has "
            f"{archive.num_bytes:,} bytes); incomplete download?"
        )
    _, *disks, here, count, size, begin, _ = _END.unpack(end)
    locator = archive.read(position - _LOCATOR.size, _LOCATOR.size)
    if locator.startswith(b"PK\6\7"):
        stated = ((count, _FULL_16), (size, _FULL_32), (begin, _FULL_32))
        position, disks, here, values = _read_end_64(archive, locator)
        if any(a not in (b, full) for (a, full), b in zip(stated, values, strict=True)):
            raise CheckpointError(f"{path}: the two ends of the archive contradict each other")
        count, size, begin = values
    if any(disks) or here != count:
        raise CheckpointError(f"{path} is one part of an archive of several; get all of it")
    if begin + size != position:
        raise CheckpointError(
            f"{path}: the directory of the archive is said to take bytes {begin:,} to "
            f"{begin + size:,}, but ends at {position:,}; incomplete download?"
        )
    if count > _MAX_MEMBERS or size > _MAX_DIRECTORY_BYTES or count * _ENTRY.size > size:
        raise CheckpointError(
            f"{path}: {count:,} members in a directory of {size:,} bytes; at most "
            f"{_MAX_MEMBERS:,} in {_MAX_DIRECTORY_BYTES:,} are read, of {_ENTRY.size} or more each"
        )
    if count * _MEMBER_MEMORY + 4 * size > archive.num_bytes + ALLOWANCE:
        raise CheckpointError(
            f"{path}: {count:,} members in a file of {archive.num_bytes:,} bytes, far more than a "
            "model has: a damaged file?"
        )
    return archive.read(begin, size), begin, count


def _read_end_64(
    archive: _Archive, locator: bytes
) -> tuple[int, list[int], int, tuple[int, int, int]]:
    """The zip64 end: its position, disks, entries here, and count, size and begin of them all."""
    _, disk, position, num_disks = _LOCATOR.unpack(locator)
    end = archive.read(position, _END_64.size)
    if not end.startswith(b"PK\6\6") or len(end) != _END_64.size or num_disks > 1:
        raise CheckpointError(
            f"{archive.path}: no zip64 directory at byte {position:,}, where there should be one; "
            "incomplete download?"
        )
    _, _, _, _, *disks, here, count, size, begin = _END_64.unpack(end)
    return position, [disk, *disks], here, (count, size, begin)


def _parse_entries(directory: bytes, count: int, path: Path) -> Iterable[_Entry]:
    position = 0
    for index in range(count):
        where = f"{path}: member {index} of {count}"
        end = position + _ENTRY.size
        if end > len(directory) or directory[position : position + 4] != b"PK\1\2":
            raise CheckpointError(f"{where} is not in the directory of the archive: a damaged file")
        fields = _ENTRY.unpack_from(directory, position)
        name_end = end + fields[10]
        extra_end = name_end + fields[11]
        position = extra_end + fields[12]
        if position > len(directory):
            raise CheckpointError(f"{where} goes past the directory of the archive: a damaged file")
        yield _check_entry(
            fields, directory[end:name_end], extra=directory[name_end:extra_end], where=where
        )
    if position != len(directory):
        raise CheckpointError(
            f"{path}: {len(directory) - position:,} bytes of the archive's directory belong to no "
            "member: a damaged file"
        )


def _check_entry(fields: tuple[Any, ...], name: bytes, *, extra: bytes, where: str) -> _Entry:
    flags, method, packed, size, disk, offset = (fields[i] for i in (3, 4, 8, 9, 13, 16))
    if flags & 1:
        raise CheckpointError(f"{where} is encrypted; decrypt the archive first")
    if method:
        raise CheckpointError(
            f"{where} is compressed (method {method}), which torch.save never does; get the "
            "original file"
        )
    if flags & ~(_HAS_DESCRIPTOR | _IS_UTF8):
        raise CheckpointError(f"{where} has the flags {flags:#x}, of which some are not known")
    size, packed, offset = _fill_zip64((size, packed, offset), extra, where=where)
    if packed != size or disk:
        raise CheckpointError(
            f"{where} of {size:,} bytes takes {packed:,} on disk {disk}; stored members are equal"
        )
    return _Entry(name, flags, size, offset)


def _find_member(archive: _Archive, entry: _Entry) -> Member:
    """The member, after its local header was compared with its entry in the directory."""
    path = archive.path
    try:
        name = entry.name.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: the name of a member is not valid UTF-8") from None
    where = f"{path}: {check_name(name, where=f'{path}: the name of a member')}"
    local = archive.read(entry.offset, _LOCAL.size + len(entry.name))
    if not local.startswith(b"PK\3\4") or len(local) != _LOCAL.size + len(entry.name):
        raise CheckpointError(f"{where} is not at byte {entry.offset:,}, where it should be")
    _, _, flags, method, _, _, _, packed, size, name_size, extra_size = _LOCAL.unpack_from(local)
    if (flags, method, name_size) != (entry.flags, 0, len(entry.name)) or (
        local[_LOCAL.size :] != entry.name
    ):
        raise CheckpointError(f"{where}: its own header contradicts the directory of the archive")
    begin = entry.offset + len(local)
    extra = archive.read(begin, extra_size) if _FULL_32 in (packed, size) else b""
    sizes = set(_fill_zip64((size, packed), extra, where=where))
    if sizes != {entry.size} and not (flags & _HAS_DESCRIPTOR and sizes == {0}):
        raise CheckpointError(
            f"{where} has {entry.size:,} bytes in the directory of the archive, "
            f"{max(sizes):,} in its own header"
        )
    return Member(name, begin + extra_size, begin + extra_size + entry.size)


def _fill_zip64(values: tuple[int, ...], extra: bytes, *, where: str) -> list[int]:
    """Values of 32 bits, with those that do not fit taken from the zip64 part of `extra`."""
    if _FULL_32 not in values:
        return list(values)
    part = _find_extra(extra)
    num_wanted = values.count(_FULL_32)
    if len(part) < 8 * num_wanted:
        raise CheckpointError(f"{where} has no zip64 sizes, but should: a damaged file")
    wide = iter(Struct(f"<{num_wanted}Q").unpack_from(part))
    return [next(wide) if value == _FULL_32 else value for value in values]


def _find_extra(extra: bytes) -> bytes:
    """The zip64 part of an extra field, or nothing."""
    position = 0
    while position + _EXTRA.size <= len(extra):
        kind, size = _EXTRA.unpack_from(extra, position)
        position += _EXTRA.size
        if kind == _ZIP64_ID:
            return extra[position : position + size]
        position += size
    return b""
