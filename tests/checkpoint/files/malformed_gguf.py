"""Broken GGUF files, by what is wrong with them; run as a program, it reads them all."""

import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.checkpoint.files.malformed import Malformed
from tests.checkpoint.peak_memory import print_growth
from tramontane.checkpoint.files.gguf_file import read_gguf

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {U8: "B", U16: "H", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q"}


def text(value: str | bytes, *, length: int | None = None) -> bytes:
    """A string with its length, or with another."""
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content) if length is None else length) + content


def key(name: str | bytes, kind: int, value: float | bytes) -> bytes:
    """An entry of the metadata; numbers are packed as their kind says."""
    if not isinstance(value, bytes):
        value = struct.pack(f"<{_FORMATS[kind]}", value)
    return text(name) + struct.pack("<I", kind) + value


def array(name: str, kind: int, items: bytes, count: int) -> bytes:
    """An entry of the metadata that is an array."""
    return key(name, ARRAY, struct.pack("<IQ", kind, count) + items)


def tensor(
    name: str | bytes,
    dims: Sequence[int] = (2,),
    *,
    kind: int = 0,
    offset: int = 0,
    rank: int | None = None,
) -> bytes:
    """An entry of the table of tensors; by default two fp32 values, 8 bytes."""
    rank = len(dims) if rank is None else rank
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", rank, *dims, kind, offset)


def encode(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"\0" * 32,
    *,
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
    magic: bytes = b"GGUF",
) -> bytes:
    """A file of these parts, with counts that are right or others."""
    num_keys = len(keys) if num_keys is None else num_keys
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    header = magic + struct.pack("<IQQ", version, num_tensors, num_keys)
    header += b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % alignment) + data


def _key(kind: int, value: float | bytes) -> bytes:
    return encode([key("some.key", kind, value)])


def _alignment(value: float, kind: int = U32) -> bytes:
    return encode([key("general.alignment", kind, value)], [tensor("w")])


def _w(dims: Sequence[int] = (2,), data: bytes = b"\0" * 32, **fields: int) -> bytes:
    return encode([], [tensor("w", dims, **fields)], data)


_WHOLE = encode(
    [key("general.name", STRING, text("x")), array("some.list", STRING, text("a") + text("b"), 2)],
    [tensor("w"), tensor("v", (32, 2), kind=2, offset=32)],
    b"\0" * (32 + 36),
)
MALFORMED: dict[str, Malformed] = (
    {
        "empty file": Malformed(b"", "has 0 bytes, not even a header"),
        "half a header": Malformed(encode()[:20], "has 20 bytes, not even a header"),
        "other magic": Malformed(encode(magic=b"GGML"), "starts with 'GGML', not with 'GGUF'"),
        "big-endian magic": Malformed(encode(magic=b"FUGG"), "is big-endian"),
        "big-endian version": Malformed(encode(version=3 << 24), "is big-endian"),
        "version 1": Malformed(encode(version=1), "is GGUF version 1; 2 and 3 are read"),
        "version 2^31": Malformed(encode(version=2**31 + 7), "is GGUF version 2147483655"),
        "2^60 tensors": Malformed(
            encode(num_tensors=2**60), "the table of tensors claims 1,152,921,"
        ),
        "2^64 - 1 tensors": Malformed(
            encode(num_tensors=2**64 - 1), "the table of tensors claims 18,446,744,073,709,551,615"
        ),
        "2^60 keys": Malformed(
            encode(num_keys=2**60), "the metadata claims 1,152,921,504,606,846,976"
        ),
        "too many keys": Malformed(encode(data=b"\0" * 2**20, num_keys=70_000), "at most 65,536"),
        "too many tensors": Malformed(
            encode(data=b"\0" * 2**23, num_tensors=200_000), "200,000 entries; at most 131,072"
        ),
        "key of length 2^64 - 1": Malformed(
            encode([text("k", length=2**64 - 1)], num_keys=1), "key 0 of 1 takes 18,446,744,073,709"
        ),
        "empty key": Malformed(encode([key("", U8, 1)]), "key 0 of 1 is '' of 0 characters"),
        "endless key": Malformed(encode([key("k" * 999, U8, 1)]), "of 999 characters"),
        "key with a line break": Malformed(
            encode([key("a\nb", U8, 1)]), r"key 0 of 1 is 'a\nb' of 3"
        ),
        "key is not UTF-8": Malformed(
            encode([key(b"\xff", U8, 1)]), "key 0 of 1 is not valid UTF-8"
        ),
        "the same key twice": Malformed(
            encode([key("a", U8, 1)] * 2), "a is there twice in the meta"
        ),
        "unknown type of value": Malformed(_key(13, b"\0"), "some.key has values of type 13"),
        "string of length 2^64 - 1": Malformed(
            _key(STRING, text("", length=2**64 - 1)),
            "some.key takes 18,446,744,073,709,551,615 bytes",
        ),
        "string of length 2^63": Malformed(
            _key(STRING, text("", length=2**63)), "some.key takes 9,2"
        ),
        "string is not UTF-8": Malformed(
            _key(STRING, text(b"a\x80")), "some.key is not valid UTF-8"
        ),
        "bool of 7": Malformed(_key(BOOL, 7), "some.key is a bool of value 7"),
        "bools of 7": Malformed(
            encode([array("some.key", BOOL, b"\1\7", 2)]), "some.key has a bool of value 7"
        ),
        "array of 2^62 numbers": Malformed(
            encode([array("some.key", F64, b"", 2**62)]),
            "some.key claims 4,611,686,018,427,387,904",
        ),
        "array of 2^61 strings": Malformed(
            encode([array("some.key", STRING, b"", 2**61)]),
            "some.key claims 2,305,843,009,213,693,952",
        ),
        "array of arrays": Malformed(
            encode([array("some.key", ARRAY, struct.pack("<IQ", U8, 0), 1)]),
            "is an array of arrays",
        ),
        "array of an unknown type": Malformed(
            encode([array("some.key", 99, b"", 1)]), "some.key is an array of type 99"
        ),
        "array of another type": Malformed(  # numbers where strings are said to be
            encode([array("some.key", STRING, struct.pack("<3Q", 2**40, 0, 0), 3)]),
            "some.key[0] takes 1,099,511,627,776 bytes",
        ),
        "array with a string too long": Malformed(
            encode([array("some.key", STRING, text("a") + text("b", length=2**50), 2)]),
            "some.key[1] takes",
        ),
        "array with a string that is not UTF-8": Malformed(
            encode([array("some.key", STRING, text("a") + text(b"\xc3"), 2)]),
            "some.key[1] is not valid UTF-8",
        ),
        "alignment 0": Malformed(_alignment(0), "general.alignment is 0; a power of two"),
        "alignment 3": Malformed(_alignment(3), "general.alignment is 3; a power of two"),
        "alignment 2^31": Malformed(_alignment(2**31), "general.alignment is 2147483648"),
        "alignment -32": Malformed(_alignment(-32, I32), "general.alignment is -32"),
        "alignment true": Malformed(_alignment(1, BOOL), "general.alignment is True"),
        "alignment 32.0": Malformed(_alignment(32.0, F32), "general.alignment is 32.0"),
        "name of length 2^64 - 1": Malformed(
            encode([], [text("w", length=2**64 - 1)], num_tensors=1),
            "tensor 0 of 1 takes 18,446,744",
        ),
        "name is not UTF-8": Malformed(
            encode([], [tensor(b"\xfe")]), "tensor 0 of 1 is not valid UTF-8"
        ),
        "name with an escape": Malformed(
            encode([], [tensor("\x1b[31m")]), "the name of tensor 0 of 1 is '\\x1b[31m'"
        ),
        "the same name twice": Malformed(
            encode([], [tensor("w"), tensor("w", offset=32)], b"\0" * 64), "w is there twice"
        ),
        "no dimensions": Malformed(_w((), rank=0), "w has 0 dimensions"),
        "5 dimensions": Malformed(_w((1, 1, 1, 1, 2)), "w has 5 dimensions; 1 to 4"),
        "2^32 - 1 dimensions": Malformed(_w(rank=2**32 - 1), "w has 4,294,967,295 dimensions"),
        "a dimension of 0": Malformed(_w((4, 0)), "w has shape [0, 4] at offset 0: no file"),
        "wrapping shape": Malformed(_w((2**33, 2**33)), "w has shape [8589934592, 8589934592]"),
        "shape that wraps to 2": Malformed(
            _w((2**63 + 1, 2)), "w has shape [2, 9223372036854775809]"
        ),
        "type 4": Malformed(_w(kind=4), "w has type 4 (which does not exist)"),
        "type IQ4_XS": Malformed(
            _w((256,), kind=23), "w has type 23 (IQ4_XS), which is not supported"
        ),
        "type 2^32 - 1": Malformed(_w(kind=2**32 - 1), "w has type 4294967295"),
        "row of 33 in Q4_0": Malformed(
            _w((33, 32), kind=2), "rows of 33 values, not a multiple of"
        ),
        "row of 128 in Q6_K": Malformed(
            _w((128, 2), kind=14), "multiple of the 256 of a Q6_K block"
        ),
        "offset past the end": Malformed(_w(offset=2**40), "w (F32, [2]) ends at byte 1,099,511,"),
        "offset 2^64 - 32": Malformed(
            _w(offset=2**64 - 32), "at offset 18,446,744,073,709,551,584"
        ),
        "misaligned offset": Malformed(_w(offset=8), "w has offset 8, not a multiple of 32"),
        "tensor larger than the file": Malformed(
            _w((9,)), "4 bytes are missing; incomplete download?"
        ),
        "overlap": Malformed(
            encode([], [tensor("a", (16,)), tensor("b", offset=32)], b"\0" * 64),
            "b starts at byte 128, inside of a",
        ),
        "same bytes twice": Malformed(encode([], [tensor("a"), tensor("b")]), "inside of a"),
    }
    | {
        f"cut after {size} bytes": Malformed(_WHOLE[:size], "incomplete download?")
        for size in (3, 24, 25, 33, 44, 60, 100, 130, 160, len(_WHOLE) - 40, len(_WHOLE) - 1)
    }
)


if __name__ == "__main__":
    contents = {name: case.content for name, case in MALFORMED.items()}
    print_growth(contents, read_gguf, Path(sys.argv[1]))
