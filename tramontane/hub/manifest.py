"""Lists of checksums: the lines of `sha256sum` and of BSD's `sha256`, and JSON {file: checksum}."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tramontane.bounded_json import parse_json
from tramontane.errors import CheckpointError
from tramontane.hub.paths import check_relative_path

Algorithm = Literal["md5", "sha1", "sha256", "git-sha1"]

_MAX_BYTES = 16 * 2**20
_NAMES = ("SHA256SUMS", "sha256sum.txt", "checklist.chk", "manifest.json")  # in this order
_HEX = r"[0-9a-fA-F]{32}|[0-9a-fA-F]{40}|[0-9a-fA-F]{64}"
_GNU = re.compile(rf"(?P<escaped>\\?)(?P<value>{_HEX})(?: [ *](?P<name>.+))?")
_BSD = re.compile(rf"(?P<kind>MD5|SHA1|SHA256) \((?P<name>.+)\) = (?P<value>{_HEX})")
_BY_LENGTH: dict[int, Algorithm] = {32: "md5", 40: "sha1", 64: "sha256"}


@dataclass(frozen=True)
class Digest:
    """A checksum in lower-case hex; `git-sha1` is that of a git blob, its length included."""

    algorithm: Algorithm
    value: str


def find_manifests(folder: Path) -> list[Path]:
    """The list of checksums that lies in a folder, or else every *.sha256, often one for a file."""
    for name in _NAMES:
        if (folder / name).is_file():
            return [folder / name]
    return sorted(folder.glob("*.sha256"))


def read_manifest(path: Path) -> dict[str, Digest]:
    """File -> checksum. Raises CheckpointError, naming the line, on anything else than that."""
    text = _read_text(path)
    entries = _parse_json(text, path) if text.lstrip().startswith("{") else _parse_lines(text, path)
    digests: dict[str, Digest] = {}
    for where, name, digest in entries:
        checked = check_relative_path(name, source=where)
        if digests.setdefault(checked, digest) != digest:
            raise CheckpointError(f"{where} gives {checked} a second, different checksum")
    if not digests:
        raise CheckpointError(f"{path} lists no file; each line should read: CHECKSUM  FILE")
    return digests


def format_manifest(digests: Mapping[str, Digest]) -> str:
    """The lines that `sha256sum --check` reads; names are escaped as it does."""
    return "".join(_format_line(name, digests[name].value) for name in sorted(digests))


def _format_line(name: str, value: str) -> str:
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{value}  {escaped}\n"


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise CheckpointError(f"{path} has more than {_MAX_BYTES:,} bytes: not a manifest")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text ({error}): not a manifest") from None


_Entries = list[tuple[str, str, Digest]]


def _parse_lines(text: str, path: Path) -> _Entries:
    entries: _Entries = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if line.strip() and not line.startswith("#"):
            where = f"{path}, line {number},"
            entries.append((where, *_parse_line(line, path, where)))
    return entries


def _parse_line(line: str, path: Path, where: str) -> tuple[str, Digest]:
    match = _GNU.fullmatch(line) or _BSD.fullmatch(line)
    if match is None:
        raise CheckpointError(
            f"{where} is {line[:80]!r}; a line should read CHECKSUM  FILE, with an MD5, SHA-1 or "
            "SHA-256 in hex, or SHA256 (FILE) = CHECKSUM"
        )
    parts = match.groupdict()
    digest = _make_digest(parts["value"], where)
    if parts.get("kind", digest.algorithm.upper()) != digest.algorithm.upper():
        raise CheckpointError(f"{where} calls a {digest.algorithm} checksum {parts['kind']}")
    name = parts["name"] or path.name.removesuffix(path.suffix)  # FILE.sha256 may hold it alone
    return _unescape(name) if parts.get("escaped") else name, digest


def _unescape(name: str) -> str:
    return re.sub(r"\\([\\nr])", lambda m: {"\\": "\\", "n": "\n", "r": "\r"}[m[1]], name)


def _parse_json(text: str, path: Path) -> _Entries:
    entries: _Entries = []
    for name, value in parse_json(text.encode(), where=str(path)).items():
        where = f"{path}, key {name!r},"
        if not isinstance(value, str):
            raise CheckpointError(f"{where} is {value!r:.80}; it should be a checksum in hex")
        entries.append((where, name, _make_digest(value, where)))
    return entries


def _make_digest(value: str, where: str) -> Digest:
    if not re.fullmatch(_HEX, value):
        raise CheckpointError(
            f"{where} is {value[:80]!r}, which is no MD5, SHA-1 or SHA-256 in hex"
        )
    return Digest(_BY_LENGTH[len(value)], value.lower())
