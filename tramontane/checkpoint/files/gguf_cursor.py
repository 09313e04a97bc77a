"""Reads the header of a GGUF file from its start, within the file and a bounded memory."""

import mmap
from pathlib import Path
from struct import Struct
from typing import Any

from tramontane.bounded_json import ALLOWANCE
from tramontane.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # 256,000 tokens with their scores and merges take 10 million
_BATCH = 1024  # strings that are read before their memory is counted
_MAX_SHORT = 256  # bytes of a string that is one of many
_U64 = Struct("<Q")


class GgufCursor:
    """A position in the header that goes forward, and never past the end.

    Its methods raise CheckpointError, naming `what` was to be read.
    """

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0
        self.num_bytes, self._charged = len(data), 0
        self._end = min(self.num_bytes, _MAX_HEADER_BYTES)

    @property
    def num_left(self) -> int:
        """Bytes of the header that may still come."""
        return self._end - self.position

    def move(self, num_bytes: int, what: str) -> int:
        """Go forward over `num_bytes`, which are in the file; the position before."""
        begin = self.position
        if num_bytes > self._end - begin:
            raise self.fail(what, f"takes {num_bytes:,} bytes at byte {begin:,}{self._say_end()}")
        self.position = begin + num_bytes
        return begin

    def take(self, layout: Struct, what: str) -> tuple[Any, ...]:
        """The next numbers."""
        return layout.unpack_from(self.data, self.move(layout.size, what))

    def take_bytes(self, num_bytes: int, what: str) -> bytes:
        """A copy of the next bytes."""
        begin = self.move(num_bytes, what)
        return self.data[begin : self.position]

    def take_string(self, what: str) -> str:
        """A length, and as many bytes of UTF-8."""
        length = self.take(_U64, what)[0]
        if length <= self.num_left:  # else the next line says so
            self.charge(5 * length, what)  # its bytes, and characters of up to four
        content = self.take_bytes(length, what)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise self.fail(what, f"is not valid UTF-8 ({error.reason})") from None

    def take_strings(self, count: int, what: str) -> list[str]:
        """Many strings. As there may be a million, those that are short go faster."""
        self.check_count(count, 8, what)
        strings: list[str] = []
        while len(strings) < count:
            num_before, begin = len(strings), self.position
            self._take_short_strings(strings, min(count, num_before + _BATCH), what)
            is_ascii = self.data[begin : self.position].isascii()
            per_string, width = (73, 1) if is_ascii else (98, 4)
            num_new = len(strings) - num_before
            self.charge(num_new * per_string + (self.position - begin) * width, what)
            if not num_new:
                strings.append(self.take_string(f"{what}[{num_before}]"))
        return strings

    def _take_short_strings(self, strings: list[str], count: int, what: str) -> None:
        """Strings until there are `count`, one is long, or the end is near."""
        data, position, last = self.data, self.position, self._end - 8 - _MAX_SHORT
        read_length = _U64.unpack_from
        try:
            while len(strings) < count and position <= last:
                begin = position + 8
                length = read_length(data, position)[0]
                if length > _MAX_SHORT:
                    break
                position = begin + length
                strings.append(data[begin:position].decode())
        except UnicodeDecodeError as error:
            where = f"{what}[{len(strings)}]"
            raise self.fail(where, f"is not valid UTF-8 ({error.reason})") from None
        self.position = position

    def charge(self, num_bytes: int, what: str) -> None:
        """Count memory that what is read takes: with the header, the size of the file and more."""
        self._charged += num_bytes
        if self._charged + self.position > self.num_bytes + ALLOWANCE:
            raise self.fail(
                what,
                f"and what stands before it could take {self._charged:,} bytes of memory, far more "
                f"than the {self.num_bytes:,} of the file: a damaged file?",
            )

    def check_count(self, count: int, item_bytes: int, what: str) -> None:
        """Refuse more items than the rest of the file can hold."""
        if count * item_bytes > self.num_left:
            raise self.fail(what, f"claims {count:,} items{self._say_end()}")

    def fail(self, what: str, fault: str) -> CheckpointError:
        """The error that names the file, and `what` in it."""
        return CheckpointError(f"{self.path}: {what} {fault}")

    def _say_end(self) -> str:
        if self._end < self.num_bytes:
            return f", but a header of more than {self._end:,} bytes is no model's: a damaged file?"
        return f", but the file has {self.num_bytes:,}; incomplete download?"
