"""Whether files on disk are those of a torrent, piece by piece; a bad piece is named in bytes.

Version 1 pieces run across the borders of files: a bad one accuses every file that it touches, and
one that cannot be read because of a missing file leaves its neighbours unknown there. A hybrid's
files are read twice, once for each version.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from tramontane.errors import CheckpointError
from tramontane.hub.merkle import BLOCK_BYTES, compute_root, round_up_to_power_of_two
from tramontane.hub.meter import Meter, OnBytes, ignore_bytes
from tramontane.hub.paths import list_files, locate
from tramontane.hub.report import FileReport, Report, Status, make_report
from tramontane.hub.torrent import HashTree, Torrent

_CHUNK_BYTES = 2**20
_MAX_RANGES = 6


def verify_torrent(
    path: Path, torrent: Torrent, *, source: str, on_bytes: OnBytes = ignore_bytes
) -> Report:
    """Check a folder, or the one file of a single-file torrent, against every piece.

    The folder may be the torrent's own or the one it lies in. Raises CheckpointError where `path`
    is neither, or a link leads out of it.
    """
    folder, places = _find_places(path, torrent, source)
    checks = {name: _FileCheck(places[name], size) for name, size in torrent.lengths.items()}
    readable = sum(max(0, min(check.length, check.size)) for check in checks.values())
    meter = Meter(readable * (bool(torrent.spans) + bool(torrent.trees)), on_bytes)
    _check_spans(torrent, checks, meter)
    for tree in torrent.trees:
        _check_tree(tree, torrent.piece_length, checks[tree.path], meter)
    present = [] if folder is None else list_files(folder)
    reports = [check.report(name) for name, check in checks.items()]
    return make_report(source, reports, present=present, ignore=[Path(source).name])


def _find_places(path: Path, torrent: Torrent, source: str) -> tuple[Path | None, dict[str, Path]]:
    """The folder to list, if the torrent is one, and where each file should be."""
    if torrent.is_single:
        (name,) = torrent.lengths
        return None, {name: locate(path, name, source=source) if path.is_dir() else path}
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; {source} holds the folder {torrent.name!r}")
    folder = path / torrent.name if (path / torrent.name).is_dir() else path
    return folder, {name: locate(folder, name, source=source) for name in torrent.lengths}


@dataclass(frozen=True)
class _BadPiece:
    """Piece `number` failed in bytes start to stop of one file; `others` are in the piece too."""

    number: int
    start: int
    stop: int
    kind: Literal["SHA-1", "SHA-256"]
    others: tuple[str, ...] = ()


@dataclass
class _FileCheck:
    """One file, what its size on disk is (-1: missing), and which of its pieces failed."""

    place: Path
    length: int
    size: int = 0
    error: str = ""
    bad: list[_BadPiece] = field(default_factory=list)
    unknown: list[_BadPiece] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self.size = self.place.stat().st_size if self.place.is_file() else -1
        except OSError as error:
            self.size, self.error = -1, str(error.strerror)

    @property
    def has_all_bytes(self) -> bool:
        return self.size >= self.length and not self.error

    def report(self, name: str) -> FileReport:
        details = [self.error, self.describe_size(), _describe(self.bad), _describe(self.unknown)]
        if self.unknown and not self.bad:
            details.append("not known, as the piece has bytes of a file that cannot be read")
        return FileReport(name, self.find_status(), "; ".join(filter(None, details)))

    def find_status(self) -> Status:
        if self.error:
            return "unreadable"
        if self.size < 0:
            return "missing"
        if self.size != self.length:
            return "wrong size"
        return "differs" if self.bad else "unknown" if self.unknown else "ok"

    def describe_size(self) -> str:
        if self.size in (-1, self.length):
            return ""
        return f"{self.size:,} bytes, should be {self.length:,}"


@dataclass(frozen=True)
class _Segment:
    """The bytes start to stop of a file (None: padding) that belong to one piece."""

    path: str | None
    start: int
    stop: int


def _check_spans(torrent: Torrent, checks: dict[str, _FileCheck], meter: Meter) -> None:
    """Version 1: SHA-1 of pieces across all files."""
    with ExitStack() as stack:
        reader = _Reader(stack, checks, meter)
        for number, segments in enumerate(_cut_pieces(torrent)):
            state = hashlib.sha1(usedforsecurity=False)
            is_whole = all(reader.is_there(s) for s in segments)
            for chunk in (c for s in segments for c in reader.read(s)) if is_whole else ():
                state.update(chunk)
            is_whole = is_whole and all(reader.is_there(s) for s in segments)
            if not is_whole or state.digest() != torrent.pieces[number]:
                _accuse(segments, number, checks, is_known=is_whole)


def _cut_pieces(torrent: Torrent) -> Iterator[list[_Segment]]:
    """For each piece, which bytes of which files it covers.

    Files of 5 and 4 bytes in pieces of 3: [a 0-3], [a 3-5, b 0-1], [b 1-4].
    """
    segments: list[_Segment] = []
    room = torrent.piece_length
    for span in torrent.spans:
        start = 0
        while start < span.length:
            stop = min(span.length, start + room)
            segments.append(_Segment(span.path, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield segments
                segments, room = [], torrent.piece_length
    if segments:
        yield segments


def _accuse(
    segments: list[_Segment], number: int, checks: dict[str, _FileCheck], *, is_known: bool
) -> None:
    """Note a piece that failed, or could not be read, with every file that it touches."""
    paths = [segment.path for segment in segments if segment.path is not None]
    for segment in segments:
        if segment.path is not None:
            check = checks[segment.path]
            others = tuple(path for path in paths if path != segment.path)
            piece = _BadPiece(number, segment.start, segment.stop, "SHA-1", others)
            if is_known:
                check.bad.append(piece)
            elif check.has_all_bytes:
                check.unknown.append(piece)


@dataclass
class _Reader:
    """Reads segments in order, with the current file open."""

    stack: ExitStack
    checks: dict[str, _FileCheck]
    meter: Meter
    path: str | None = None
    file: BinaryIO | None = None

    def is_there(self, segment: _Segment) -> bool:
        if segment.path is None:
            return True
        check = self.checks[segment.path]
        return not check.error and check.size >= segment.stop

    def read(self, segment: _Segment) -> Iterator[bytes]:
        """Chunks of a segment; on an error of the disk they end, and the file is marked."""
        if segment.path is None:
            yield from _zeros(segment.stop - segment.start)
            return
        try:
            yield from _read_range(self.open(segment.path), segment.start, segment.stop, self.meter)
        except OSError as error:
            self.checks[segment.path].error = str(error.strerror)

    def open(self, path: str) -> BinaryIO:
        if self.file is None or path != self.path:
            self.stack.close()  # the previous file
            self.file = self.stack.enter_context(self.checks[path].place.open("rb"))
            self.path = path
        return self.file


def _check_tree(tree: HashTree, piece_length: int, check: _FileCheck, meter: Meter) -> None:
    """Version 2: a SHA-256 tree over the blocks of each piece of one file."""
    if check.size < 0 or check.error:
        return
    width = piece_length // BLOCK_BYTES
    if len(tree.pieces) == 1:
        width = round_up_to_power_of_two(-(-tree.length // BLOCK_BYTES))
    try:
        with check.place.open("rb") as file:
            for number, expected in enumerate(tree.pieces):
                start = number * piece_length
                stop = min(start + piece_length, tree.length)
                if stop > check.size:
                    break  # of the wrong size, which is said
                chunks = _read_range(file, start, stop, meter)
                if _hash_piece(chunks, width) != expected:
                    check.bad.append(_BadPiece(number, start, stop, "SHA-256"))
    except OSError as error:
        check.error = str(error.strerror)


def _hash_piece(chunks: Iterator[bytes], width: int) -> bytes:
    """Chunks are whole blocks, but for the last."""
    leaves = [
        hashlib.sha256(chunk[start : start + BLOCK_BYTES]).digest()
        for chunk in chunks
        for start in range(0, len(chunk), BLOCK_BYTES)
    ]
    return compute_root(leaves, width=width)


def _read_range(file: BinaryIO, start: int, stop: int, meter: Meter) -> Iterator[bytes]:
    """The bytes from start to stop in chunks. Raises OSError, also where the file ends early."""
    file.seek(start)
    while start < stop:
        chunk = file.read(min(_CHUNK_BYTES, stop - start))
        if not chunk:
            raise OSError(0, "it became shorter while it was read")
        start += len(chunk)
        meter.add(len(chunk))
        yield chunk


def _zeros(count: int) -> Iterator[bytes]:
    for start in range(0, count, _CHUNK_BYTES):
        yield bytes(min(_CHUNK_BYTES, count - start))


def _describe(pieces: list[_BadPiece]) -> str:
    """Neighbouring pieces as one range: "bytes 0-32,767 (SHA-1 piece 0, shared with b.txt)"."""
    ranges: list[list[_BadPiece]] = []
    for piece in pieces:
        last = ranges[-1][-1] if ranges else None
        if last and (last.kind, last.stop, last.others) == (piece.kind, piece.start, piece.others):
            ranges[-1].append(piece)
        else:
            ranges.append([piece])
    texts = [_describe_range(pieces) for pieces in ranges[:_MAX_RANGES]]
    if len(ranges) > _MAX_RANGES:
        texts.append(f"and {len(ranges) - _MAX_RANGES} more ranges")
    return ", ".join(texts)


def _describe_range(pieces: list[_BadPiece]) -> str:
    first, last = pieces[0], pieces[-1]
    numbers = f"piece {first.number}"
    if last.number > first.number:
        numbers = f"pieces {first.number}-{last.number}"
    shared = f", shared with {', '.join(first.others[:3])}" if first.others else ""
    return f"bytes {first.start:,}-{last.stop - 1:,} ({first.kind} {numbers}{shared})"
