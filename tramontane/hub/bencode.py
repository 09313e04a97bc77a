"""Bencode (BEP 3), the format of .torrent files: whole numbers, byte strings, lists, dictionaries.

Strict: one spelling for each value, keys sorted, nothing behind the end. Input is trusted no more
than its own length allows: no string beyond the end, a bounded number of values and depth.
"""

from dataclasses import dataclass
from typing import TypeAlias

from tramontane.errors import CheckpointError

Value: TypeAlias = "int | bytes | list[Value] | dict[bytes, Value]"

MAX_DEPTH = 64
MAX_VALUES = 1_000_000
_MAX_DIGITS = 19  # below 2**63


def parse_bencode(content: bytes, *, source: str) -> Value:
    """The one value that `content` holds. Raises CheckpointError, naming source and byte."""
    reader = _Reader(content, source)
    value = reader.read_value(0)
    if reader.position != len(content):
        raise reader.fail("more bytes follow the end")
    return value


def encode_bencode(value: Value) -> bytes:
    """The one spelling of a value; of what was parsed, the bytes it was parsed from."""
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, bytes):
        return b"%d:%b" % (len(value), value)
    if isinstance(value, list):
        return b"l%be" % b"".join(map(encode_bencode, value))
    return b"d%be" % b"".join(
        encode_bencode(key) + encode_bencode(value[key]) for key in sorted(value)
    )


@dataclass
class _Reader:
    content: bytes
    source: str
    position: int = 0
    num_values: int = 0

    def fail(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source} is not a valid torrent: {reason} (byte {self.position:,} of "
            f"{len(self.content):,}); fetch it again"
        )

    def read_value(self, depth: int) -> Value:
        self.num_values += 1
        if depth > MAX_DEPTH:
            raise self.fail(f"lists lie more than {MAX_DEPTH} deep in one another")
        if self.num_values > MAX_VALUES:
            raise self.fail(f"it has more than {MAX_VALUES:,} values")
        mark = self._peek()
        if mark == b"i":
            self.position += 1
            return self._read_number(end=b"e", may_be_negative=True)
        if mark == b"l":
            return self._read_list(depth)
        if mark == b"d":
            return self._read_dictionary(depth)
        return self._read_string()

    def _peek(self) -> bytes:
        mark = self.content[self.position : self.position + 1]
        if not mark:
            raise self.fail("it ends too early")
        return mark

    def _read_number(self, *, end: bytes, may_be_negative: bool = False) -> int:
        stop = self.content.find(end, self.position, self.position + _MAX_DIGITS + 2)
        text = self.content[self.position : max(stop, self.position)]
        digits = text[1:] if may_be_negative and text[:1] == b"-" else text
        is_plain = digits.isdigit() and len(digits) <= _MAX_DIGITS
        if not is_plain or (digits[:1] == b"0" and text != b"0"):
            raise self.fail("a whole number is misspelt or too large")
        self.position = stop + 1
        return int(text)

    def _read_string(self) -> bytes:
        length = self._read_number(end=b":")
        if length > len(self.content) - self.position:
            raise self.fail(f"a string of {length:,} bytes does not fit")
        start, self.position = self.position, self.position + length
        return self.content[start : self.position]

    def _read_list(self, depth: int) -> list[Value]:
        self.position += 1
        values: list[Value] = []
        while self._peek() != b"e":
            values.append(self.read_value(depth + 1))
        self.position += 1
        return values

    def _read_dictionary(self, depth: int) -> dict[bytes, Value]:
        self.position += 1
        values: dict[bytes, Value] = {}
        previous: bytes | None = None
        while self._peek() != b"e":
            key = self._read_string()
            if previous is not None and key <= previous:
                raise self.fail(f"key {key[:40]!r} is not sorted behind {previous[:40]!r}")
            values[key] = self.read_value(depth + 1)
            previous = key
        self.position += 1
        return values
