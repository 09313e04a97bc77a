"""Text documents on disk, by domain: JSON Lines or plain text, gzip-compressed or not.

A JSON Lines record is one document; its `split` field ("train" or "valid") is obeyed, and where it
is absent a hash of the text decides. A plain text file is one document, whose end is held out.
"""

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

from tramontane.errors import ConfigError, DataError

Split = Literal["train", "valid"]

MAX_LINE_BYTES = 2**26  # of JSON Lines: a text of this size takes gigabytes to encode
VALID_SHARE = 0.05  # of the documents, or of a plain text file, where the file does not say

_KINDS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
_DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # also part of a folder's name


@dataclass(frozen=True)
class Source:
    """One file of one domain, and the domain's share of the mixture, relative to the others."""

    domain: str
    path: str
    weight: float = 1.0
    text_field: str = "text"

    def __post_init__(self) -> None:
        if not _DOMAIN_NAME.fullmatch(self.domain):
            raise ConfigError(
                f"domain name {self.domain!r} must be letters, digits, '.', '_' and '-'"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigError(
                f"domain {self.domain}: weight is {self.weight}, but must be positive"
            )
        if not self.path.endswith(_KINDS):
            raise ConfigError(f"{self.path}: the name must end in one of {', '.join(_KINDS)}")


def parse_source(spec: str) -> Source:
    """`[DOMAIN=]PATH[:WEIGHT]` -> Source; without a domain, the file name up to its first dot.

    Raises ConfigError.
    """
    domain, _, rest = spec.partition("=") if "=" in spec else ("", "", spec)
    path, _, weight = rest.rpartition(":")
    if not path:
        path, weight = rest, "1"
    try:
        return Source(domain or Path(path).name.partition(".")[0], path, float(weight))
    except ValueError as error:
        raise ConfigError(
            f"source {spec!r}: {weight!r} is not a weight; write [DOMAIN=]PATH[:WEIGHT]"
        ) from error


def require_distinct_domains(sources: Sequence[Source]) -> None:
    """Raises ConfigError if there is no source, or if two name one domain."""
    if not sources:
        raise ConfigError("no text source is given: name at least one file")
    paths: dict[str, str] = {}
    for source in sources:
        if source.domain in paths:
            raise ConfigError(
                f"{paths[source.domain]} and {source.path} are both domain {source.domain}: "
                f"give each its own name (DOMAIN=PATH)"
            )
        paths[source.domain] = source.path


def read_documents(source: Source, *, split: Split) -> Iterator[str]:
    """Yields the documents of one split in file order.

    Raises DataError, with file and line, for a file that cannot be read, bytes that are not UTF-8,
    malformed JSON, a line beyond MAX_LINE_BYTES, a missing or empty text, and an unknown split.
    """
    is_json = source.path.endswith((".jsonl", ".jsonl.gz"))
    documents = _read_json_lines(source, split) if is_json else _read_plain(source, split)
    try:
        yield from documents
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{source.path}: cannot be read ({error})") from error


def _open(path: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def _read_json_lines(source: Source, split: Split) -> Iterator[str]:
    with _open(source.path) as file:
        # Lines of bytes end at "\n" alone; str.splitlines would also cut at U+2028 inside a text.
        lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            where = f"{source.path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"{where}: the line is longer than {MAX_LINE_BYTES:,} bytes; divide its text "
                    "into several records"
                )
            if not line.strip():
                continue
            record = _parse_record(line, where)
            text = _get_text(record, source.text_field, where)
            if _get_split(record, text, where) == split:
                yield text


def _parse_record(line: bytes, where: str) -> dict[str, object]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} of the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at character {error.pos})") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON is nested too deeply") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record must be a JSON object, not {type(record).__name__}")
    return record


def _get_text(record: dict[str, object], field: str, where: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        raise DataError(f"{where}: no text in field {field!r}; the record has {sorted(record)}")
    if not text.strip():
        raise DataError(f"{where}: the text in field {field!r} is empty; remove the record")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} of the text is a lone surrogate"
        ) from error
    return text


def _get_split(record: dict[str, object], text: str, where: str) -> Split:
    split = record.get("split")
    if split is None:
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
        return "valid" if int.from_bytes(digest) < VALID_SHARE * 2**64 else "train"
    if split not in ("train", "valid"):
        raise DataError(f"{where}: split is {split!r}, but must be 'train' or 'valid'")
    return split


def _read_plain(source: Source, split: Split) -> Iterator[str]:
    with _open(source.path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{source.path}:{line}: byte {error.start} of the file is not UTF-8"
        ) from error
    cut = _find_valid_start(text)
    part = text[:cut] if split == "train" else text[cut:]
    if part.strip():
        yield part


def _find_valid_start(text: str) -> int:
    """The first line start in the held-out end of `text`, or where that end begins."""
    start = int(len(text) * (1 - VALID_SHARE))
    return text.find("\n", start, -1) + 1 or start
