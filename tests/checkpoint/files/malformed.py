"""Broken safetensors files, by what is wrong with them; run as a program, it reads them all."""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tests.checkpoint.peak_memory import print_growth
from tramontane.checkpoint.files.safetensors_file import read_table


class Malformed(NamedTuple):
    """Bytes of a file, and a part of the message that they must lead to."""

    content: bytes
    reason: str


def encode(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header (bytes as they are, other values as JSON) and a stated length."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(encoded) if length is None else length
    return stated.to_bytes(8, "little") + encoded + data


def entry(begin: Any, end: Any, *, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    """A header entry; by default two fp32 values, 8 bytes."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _one(value: Any, data: bytes = b"\0" * 8) -> bytes:
    return encode({"w": value}, data)


_DATA = b"\0" * 8
MALFORMED: dict[str, Malformed] = {
    "empty file": Malformed(b"", "0 bytes, not even a header; incomplete download"),
    "seven bytes": Malformed(b"\0" * 7, "7 bytes, not even a header"),
    "header of length 0": Malformed(encode(b""), "is not valid JSON"),
    "length 7": Malformed(encode({"w": 1}, length=7), "is not valid JSON"),
    "length 2^63": Malformed(encode({}, length=2**63), "claims 9,223,372,036,854,775,808 bytes"),
    "length 2^64 - 1": Malformed(encode({}, length=2**64 - 1), "claims 18,446,744,073,709,551,615"),
    "length one too large": Malformed(encode({}, length=3), "claims 3 bytes, the file has 10"),
    "header cut off": Malformed(encode(b'{"w":{"dtype"'), "is not valid JSON"),
    "not UTF-8": Malformed(encode(b'{"\xff":1}'), "is not valid JSON"),
    "UTF-16": Malformed(encode('{"w":{}}'.encode("utf-16")), "is not valid JSON"),
    "a list": Malformed(encode([1, 2]), "is a list, not a JSON object"),
    "nested without end": Malformed(encode(b"[" * 100_000), "is not valid JSON"),
    "the same name twice": Malformed(
        encode(b'{"w":%(e)s,"w":%(e)s}' % {b"e": json.dumps(entry(0, 8)).encode()}, _DATA),
        "'w' is there twice",
    ),
    "entry is a number": Malformed(_one(3), "w: its entry is not"),
    "no offsets": Malformed(_one({"dtype": "F32", "shape": [2]}), "w: its entry is not"),
    "overlap": Malformed(encode({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12), "b overlaps a"),
    "same bytes twice": Malformed(
        encode({"a": entry(0, 8), "b": entry(0, 8)}, _DATA), "b overlaps a"
    ),
    "hole": Malformed(
        encode({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20), "b leaves a hole after a"
    ),
    "hole at the start": Malformed(
        _one(entry(4, 12), b"\0" * 12), "w leaves a hole after the header"
    ),
    "trailing bytes": Malformed(_one(entry(0, 8), b"\0" * 11), "3 bytes belong to no tensor"),
    "only trailing bytes": Malformed(encode({}, _DATA), "8 bytes belong to no tensor"),
    "begin after end": Malformed(_one(entry(8, 0)), "w: data_offsets [8, 0] are not begin and end"),
    "negative offset": Malformed(_one(entry(-8, 0)), "w: data_offsets is [-8, 0]"),
    "float offsets": Malformed(_one(entry(0.0, 8.0)), "w: data_offsets is [0.0, 8.0]"),
    "boolean offsets": Malformed(_one(entry(False, 8)), "w: data_offsets is [False, 8]"),
    "three offsets": Malformed(
        _one({"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}),
        "w: data_offsets is [0, 4, 8]",
    ),
    "offset beyond 2^64": Malformed(_one(entry(0, 2**70)), "needs 8 bytes, data_offsets give"),
    "number of 10,000 digits": Malformed(
        encode(
            b'{"w":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,8]}}', _DATA
        ),
        "is not valid JSON",
    ),
    "wrapping shape": Malformed(_one(entry(0, 8, shape=[2**33, 2**33])), "w: shape"),
    "empty shape that wraps": Malformed(
        _one(entry(0, 0, shape=[2**33, 2**33, 0])), "w: shape [8589934592, 8589934592, 0]"
    ),
    "negative shape": Malformed(_one(entry(0, 8, shape=[-1, -2])), "w: shape is [-1, -2]"),
    "shape of text": Malformed(_one(entry(0, 8, shape=["2"])), "w: shape is ['2']"),
    "shape is a number": Malformed(_one(entry(0, 8, shape=2)), "w: shape is 2"),
    "rank 10^5": Malformed(_one(entry(0, 8, shape=[1] * 10**5)), "w: shape is [1, 1"),
    "rank 10^6": Malformed(_one(entry(0, 8, shape=[1] * 10**6)), "bytes of memory when it is pars"),
    "metadata is a list": Malformed(encode({"__metadata__": [1]}), "__metadata__ is no map of str"),
    "metadata of numbers": Malformed(
        encode({"__metadata__": {"a": 1}}), "__metadata__ is no map of strings"
    ),
    "unknown dtype": Malformed(_one(entry(0, 8, dtype="F7")), "w: dtype 'F7' is not supported"),
    "integer dtype": Malformed(_one(entry(0, 8, dtype="I32")), "w: dtype 'I32' is not supported"),
    "dtype is a list": Malformed(_one(entry(0, 8, dtype=["F32"])), "w: dtype ['F32']"),
    "size mismatch": Malformed(
        _one(entry(0, 8, shape=[3])), "w: F32 of shape [3] needs 12 bytes, data_offsets give it 8"
    ),
    "data cut off": Malformed(
        _one(entry(0, 8), b"\0" * 5), "3 bytes are missing; incomplete download"
    ),
}


if __name__ == "__main__":
    contents = {name: case.content for name, case in MALFORMED.items()}
    print_growth(contents, read_table, Path(sys.argv[1]))
