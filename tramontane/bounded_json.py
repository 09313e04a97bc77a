"""JSON that nobody vouches for: an object in which no key is there twice, in bounded memory.

Parsed JSON can take forty times the bytes of its text: a list of one list, `[[]],`, is five bytes
and takes 175. What it will take is estimated from above before anything is parsed.
"""

import json
from collections.abc import Sequence
from typing import Any

from tramontane.errors import CheckpointError

ALLOWANCE = 16 * 2**20  # bytes that reading a small file may take
_MARKS = (b"[", b"{", b":", b",", b'"')
# A list of one list costs most, 96 bytes a bracket; a key and its value take 68 a mark.
_BYTES_PER_MARK = 96
_ABOVE_LATIN, _ABOVE_BMP = range(0xC4, 0x100), range(0xF0, 0x100)  # first bytes in UTF-8


def parse_json(encoded: bytes, *, where: str, memory: int | None = None) -> dict[str, Any]:
    """The object that `encoded` holds; CheckpointError says what is wrong `where`.

    `memory` is what may be taken in all, the encoded bytes included; by default their size and
    16 MiB.
    """
    check_memory(encoded, where=where, memory=memory)
    try:
        text = encoded.decode()
        del encoded  # where the caller holds it no longer, either
        values = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}; incomplete download?") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is a {type(values).__name__}, not a JSON object")
    return values


def check_memory(encoded: bytes, *, where: str, memory: int | None = None) -> None:
    """Raise CheckpointError if parsing `encoded` could take more than `memory`."""
    allowed = len(encoded) + ALLOWANCE if memory is None else memory
    if (needed := estimate_memory(encoded)) > allowed:
        raise CheckpointError(
            f"{where} could take {needed:,} bytes of memory when it is parsed, and no model's "
            f"takes more than {allowed:,}: a damaged file?"
        )


def estimate_memory(encoded: bytes) -> int:
    """At most so many bytes are taken by the text of JSON and all that it says, together."""
    width = _find_width(encoded)
    # Strings lie in the text and in the objects. An escape can make four-byte characters out of
    # ASCII, which lie there once more while they are copied from narrower ones.
    per_byte = width + (6 if b"\\u" in encoded else 1.25 * width)
    num_marks = sum(map(encoded.count, _MARKS))
    return int(len(encoded) * per_byte) + num_marks * _BYTES_PER_MARK


def _find_width(encoded: bytes) -> int:
    """Bytes that Python takes for each character of the text: those of its widest."""
    if encoded.isascii():
        return 1
    if _has_any(encoded, _ABOVE_BMP):
        return 4
    return 2 if _has_any(encoded, _ABOVE_LATIN) else 1


def _has_any(encoded: bytes, values: range) -> bool:
    return any(bytes((value,)) in encoded for value in values)


def _refuse_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key[:80]!a} is there twice")
        values[key] = value
    return values
