"""What a .torrent file promises: names, lengths, and the hashes of pieces.

Version 1 (BEP 3) hashes pieces of all files laid end to end with SHA-1. Version 2 (BEP 52) gives
each file a SHA-256 tree of its own. A hybrid has both, its files padded to whole pieces (BEP 47).
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tramontane.errors import CheckpointError
from tramontane.hub.bencode import Value, encode_bencode, parse_bencode
from tramontane.hub.merkle import (
    BLOCK_BYTES,
    HASH_BYTES,
    compute_padding,
    compute_root,
    round_up_to_power_of_two,
)
from tramontane.hub.paths import check_parts

_MAX_BYTES = 64 * 2**20
_MAX_PIECE_BYTES = 2**30
_SHA1_BYTES = 20
_T = TypeVar("_T", int, bytes, "list[Value]", "dict[bytes, Value]")


@dataclass(frozen=True)
class Span:
    """A file's bytes in the row of all files; without a path, padding that is on no disk: zeros."""

    path: str | None
    length: int


@dataclass(frozen=True)
class HashTree:
    """A file and its SHA-256 of each piece; a file of one piece has the root of its tree there."""

    path: str
    length: int
    pieces: tuple[bytes, ...]


@dataclass(frozen=True)
class Torrent:
    """`spans` and `pieces` are version 1, `trees` version 2; a hybrid has both, of the same files.

    `is_single` says that the torrent is one file, not a folder called `name`; `info_hash` is what a
    magnet link calls the torrent by.
    """

    name: str
    is_single: bool
    piece_length: int
    info_hash: str
    lengths: dict[str, int]
    spans: tuple[Span, ...] = ()
    pieces: tuple[bytes, ...] = ()
    trees: tuple[HashTree, ...] = ()


def read_torrent(path: Path) -> Torrent:
    """Read a .torrent file. Raises CheckpointError on whatever is not as BEP 3, 47 and 52 say."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise CheckpointError(f"{path} has more than {_MAX_BYTES:,} bytes: not a torrent")
    return _Parser(str(path)).parse(parse_bencode(content, source=str(path)))


@dataclass(frozen=True)
class _Parser:
    source: str

    def fail(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.source} is not a valid torrent: {reason}; fetch it again")

    def parse(self, value: Value) -> Torrent:
        top = self.expect(value, dict, "the whole")
        info = self.get(top, b"info", dict)
        name = check_parts([self.decode(self.get(info, b"name", bytes))], source=self.source)
        piece_length = self.get(info, b"piece length", int)
        if not 0 < piece_length <= _MAX_PIECE_BYTES:
            raise self.fail(f"piece length is {piece_length}")
        version = self.get(info, b"meta version", int) if b"meta version" in info else 1
        if version not in (1, 2):
            raise self.fail(f"meta version is {version}; 1 and 2 are known")
        has_first = version == 1 or b"pieces" in info
        spans = self.read_spans(info, name) if has_first else ()
        pieces = self.read_pieces(info, spans, piece_length) if has_first else ()
        trees = self.read_trees(info, top, piece_length) if version == 2 else ()
        is_single = b"length" in info
        if version == 2:
            is_single = len(trees) == 1 and trees[0].path == name
        info_hash = _hash_info(info, has_first=has_first, has_second=version == 2)
        return self.combine(
            Torrent(name, is_single, piece_length, info_hash, {}, spans, pieces, trees)
        )

    def combine(self, torrent: Torrent) -> Torrent:
        """Both versions have to speak of the same files."""
        first = {span.path: span.length for span in torrent.spans if span.path is not None}
        second = {tree.path: tree.length for tree in torrent.trees}
        if torrent.spans and torrent.trees and first != second:
            names = sorted({path for path, _ in first.items() ^ second.items()})
            raise self.fail(f"its version 1 and 2 list different files: {names[:4]}")
        lengths = first or second
        if not lengths:
            raise self.fail("it has no files")
        return replace(torrent, lengths=lengths)

    def read_spans(self, info: dict[bytes, Value], name: str) -> tuple[Span, ...]:
        if b"length" in info and b"files" in info:
            raise self.fail("it is one file and a folder at once")
        if b"length" in info:
            return (Span(name, self.read_length(info)),)
        spans: list[Span] = []
        seen: set[str] = set()
        for entry in self.get(info, b"files", list):
            span = self.read_span(self.expect(entry, dict, "a file"))
            if span.path in seen:
                raise self.fail(f"it lists {span.path!r} twice")
            if span.path is not None:
                seen.add(span.path)
            elif not spans or spans[-1].path is None:
                raise self.fail("padding follows no file")
            spans.append(span)
        return tuple(spans)

    def read_span(self, entry: dict[bytes, Value]) -> Span:
        length = self.read_length(entry)
        attributes = self.get(entry, b"attr", bytes) if b"attr" in entry else b""
        if b"p" in attributes:
            if length > _MAX_PIECE_BYTES:
                raise self.fail(f"a padding has {length:,} bytes")
            return Span(None, length)
        if b"l" in attributes:
            raise self.fail("it has symbolic links, which are not followed")
        parts = [
            self.decode(self.expect(part, bytes, "a part of a path"))
            for part in self.get(entry, b"path", list)
        ]
        return Span(check_parts(parts, source=self.source), length)

    def read_pieces(
        self, info: dict[bytes, Value], spans: tuple[Span, ...], piece_length: int
    ) -> tuple[bytes, ...]:
        joined = self.get(info, b"pieces", bytes)
        total = sum(span.length for span in spans)
        expected = -(-total // piece_length)
        if len(joined) != expected * _SHA1_BYTES:
            raise self.fail(
                f"it has {len(joined):,} bytes of SHA-1 for {expected:,} pieces; "
                f"{expected * _SHA1_BYTES:,} are needed"
            )
        return _split(joined, _SHA1_BYTES)

    def read_trees(
        self, info: dict[bytes, Value], top: dict[bytes, Value], piece_length: int
    ) -> tuple[HashTree, ...]:
        if piece_length < BLOCK_BYTES or piece_length & (piece_length - 1):
            raise self.fail(f"piece length is {piece_length}; version 2 needs a power of two")
        layers = self.get(top, b"piece layers", dict) if b"piece layers" in top else {}
        trees: list[HashTree] = []
        waiting: list[tuple[tuple[str, ...], Value]] = [((), self.get(info, b"file tree", dict))]
        while waiting:
            parts, value = waiting.pop()
            node = self.expect(value, dict, "a folder")
            if b"" not in node:
                waiting += [((*parts, self.decode(k)), node[k]) for k in sorted(node, reverse=True)]
            elif len(node) > 1:
                raise self.fail(f"{'/'.join(parts)!r} is both a file and a folder")
            else:
                path = check_parts(parts, source=self.source)
                file = self.get(node, b"", dict)
                trees.append(self.read_tree(file, path, layers, piece_length))
        return tuple(trees)

    def read_tree(
        self,
        file: dict[bytes, Value],
        path: str,
        layers: dict[bytes, Value],
        piece_length: int,
    ) -> HashTree:
        length = self.read_length(file)
        if b"attr" in file and b"l" in self.get(file, b"attr", bytes):
            raise self.fail("it has symbolic links, which are not followed")
        if length == 0:
            return HashTree(path, 0, ())
        root = self.get(file, b"pieces root", bytes)
        if len(root) != HASH_BYTES:
            raise self.fail(f"the pieces root of {path!r} has {len(root)} bytes, not 32")
        if length <= piece_length:
            return HashTree(path, length, (root,))
        layer = self.expect(layers.get(root), bytes, f"the piece layer of {path!r}")
        count = -(-length // piece_length)
        if len(layer) != count * HASH_BYTES:
            raise self.fail(
                f"the piece layer of {path!r} has {len(layer)} bytes for {count} pieces"
            )
        pieces = _split(layer, HASH_BYTES)
        padding = compute_padding(piece_length // BLOCK_BYTES)
        width = round_up_to_power_of_two(count)
        if compute_root(list(pieces), width=width, padding=padding) != root:
            raise self.fail(f"the piece layer of {path!r} does not belong to its root")
        return HashTree(path, length, pieces)

    def read_length(self, entry: dict[bytes, Value]) -> int:
        length = self.get(entry, b"length", int)
        if length < 0:
            raise self.fail(f"a file has {length} bytes")
        return length

    def get(self, values: dict[bytes, Value], key: bytes, kind: type[_T]) -> _T:
        return self.expect(values.get(key), kind, f"{key.decode()!r}")

    def expect(self, value: "Value | None", kind: type[_T], what: str) -> _T:
        if isinstance(value, kind):
            return value
        found = "missing" if value is None else f"{type(value).__name__}"
        raise self.fail(f"{what} is {found}, where {kind.__name__} should be")

    def decode(self, name: bytes) -> str:
        try:
            return name.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the name {name[:80]!r} is not UTF-8") from None


def _hash_info(info: dict[bytes, Value], *, has_first: bool, has_second: bool) -> str:
    content = encode_bencode(info)  # the very bytes of the file, as the parser is strict
    first = hashlib.sha1(content, usedforsecurity=False).hexdigest() if has_first else ""
    second = hashlib.sha256(content).hexdigest() if has_second else ""
    return " and ".join(filter(None, (first, second)))


def _split(joined: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(joined[start : start + size] for start in range(0, len(joined), size))
