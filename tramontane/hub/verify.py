"""Whether the files of a model are, byte for byte, what a list of checksums says."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tramontane.atomic import atomic_file
from tramontane.errors import CheckpointError, StorageError
from tramontane.hub.formats import find_absent_shards
from tramontane.hub.hub_digests import read_hub_digests
from tramontane.hub.manifest import Digest, find_manifests, format_manifest, read_manifest
from tramontane.hub.meter import Meter, OnBytes, ignore_bytes
from tramontane.hub.paths import list_files, locate
from tramontane.hub.report import FileReport, Report, make_report

_CHUNK_BYTES = 4 * 2**20


def verify_model(
    path: Path, *, manifest: Path | None = None, on_bytes: OnBytes = ignore_bytes
) -> Report:
    """Check a model folder, or one file, against `manifest` or what is found beside it.

    Looked for are, in this order: what the hub said when it was fetched from there, and SHA256SUMS,
    sha256sum.txt, checklist.chk, manifest.json or *.sha256 in the folder. Raises CheckpointError
    where there is nothing to check, nothing to check against, or a list that leads out of the
    folder.
    """
    folder, only = (path.parent, path.name) if path.is_file() else (path, None)
    if not folder.is_dir():
        raise CheckpointError(f"{path} does not exist; name a model folder, or a file")
    try:
        checksums = _find_checksums(folder, manifest)
        if only is None:
            return _verify_folder(folder, checksums, on_bytes)
        return _verify_file(folder, only, checksums, on_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def write_manifest(
    folder: Path, target: Path, *, on_bytes: OnBytes = ignore_bytes
) -> dict[str, Digest]:
    """Write the SHA-256 of every file in `folder`, hidden ones and `target` left out.

    Raises CheckpointError where there is no file, or one cannot be read, and StorageError where
    `target` cannot be written.
    """
    names = [name for name in list_files(folder) if (folder / name).resolve() != target.resolve()]
    if not folder.is_dir() or not names:
        raise CheckpointError(f"{folder} is not a folder with files; name a model folder")
    if wrong := next((name for name in names if not _is_text(name)), None):
        raise StorageError(f"{folder}: the file name {wrong!r} is not UTF-8; rename the file")
    meter = Meter(_count_bytes(folder / name for name in names), on_bytes)
    try:
        digests = {n: Digest("sha256", hash_file(folder / n, "sha256", meter)) for n in names}
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    with atomic_file(target) as temporary:
        temporary.write_text(format_manifest(digests), encoding="utf-8")
    return digests


def hash_file(path: Path, algorithm: str, meter: Meter) -> str:
    """The checksum of a file in hex, read in large chunks. Raises OSError."""
    is_git = algorithm == "git-sha1"
    state = hashlib.new("sha1" if is_git else algorithm, usedforsecurity=False)
    if is_git:
        state.update(b"blob %d\0" % path.stat().st_size)
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            meter.add(count)
    return state.hexdigest()


@dataclass(frozen=True)
class _Checksums:
    """What to check against, what to call it, and the files it was read from."""

    source: str
    digests: Mapping[str, Digest]
    files: tuple[Path, ...] = ()


def _find_checksums(folder: Path, manifest: Path | None) -> _Checksums:
    if manifest is not None:
        return _Checksums(str(manifest), read_manifest(manifest), (manifest,))
    if digests := read_hub_digests(folder):
        return _Checksums(f"the hub's checksums of {folder}", digests)
    paths = find_manifests(folder)
    if not paths:
        raise CheckpointError(
            f"{folder} has no checksums to verify against (SHA256SUMS, *.sha256, checklist.chk, "
            "manifest.json, or a hub's); name them with --manifest FILE or --torrent FILE"
        )
    merged: dict[str, Digest] = {}
    for path in paths:
        for name, digest in read_manifest(path).items():
            if merged.setdefault(name, digest) != digest:
                raise CheckpointError(f"{path} gives {name} another checksum than {paths[0]}")
    return _Checksums(", ".join(map(str, paths[:3])), merged, tuple(paths))


def _verify_folder(folder: Path, checksums: _Checksums, on_bytes: OnBytes) -> Report:
    digests = checksums.digests
    places = {name: locate(folder, name, source=checksums.source) for name in sorted(digests)}
    meter = Meter(_count_bytes(places.values()), on_bytes)
    present = list(list_files(folder))
    reports = [_check_file(place, name, digests[name], meter) for name, place in places.items()]
    reports += [
        FileReport(name, "missing", "by the names of the other shards there is one")
        for name in find_absent_shards([*present, *digests])
        if name not in digests
    ]
    lists = [path.name for path in checksums.files if path.parent.resolve() == folder.resolve()]
    return make_report(checksums.source, reports, present=present, ignore=lists)


def _verify_file(folder: Path, name: str, checksums: _Checksums, on_bytes: OnBytes) -> Report:
    source, digests = checksums.source, checksums.digests
    if name not in digests:
        raise CheckpointError(f"{source} has no checksum of {name}; it has {sorted(digests)[:8]}")
    place = locate(folder, name, source=source)
    meter = Meter(_count_bytes([place]), on_bytes)
    return make_report(source, [_check_file(place, name, digests[name], meter)], present=[])


def _check_file(place: Path, name: str, digest: Digest, meter: Meter) -> FileReport:
    if not place.is_file():
        return FileReport(name, "missing")
    try:
        value = hash_file(place, digest.algorithm, meter)
    except OSError as error:
        return FileReport(name, "unreadable", str(error.strerror))
    if value == digest.value:
        return FileReport(name, "ok")
    return FileReport(name, "differs", f"{digest.algorithm} is {value}, not {digest.value}")


def _count_bytes(places: Iterable[Path]) -> int:
    return sum(place.stat().st_size for place in places if place.is_file())


def _is_text(name: str) -> bool:
    return not any(0xD800 <= ord(char) <= 0xDFFF for char in name)  # undecodable bytes of a name
