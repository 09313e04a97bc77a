"""The protocol buffer of a SentencePiece model, as far as a vocabulary needs it: read its pieces,
write one from pieces. Field numbers are those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from tramontane.errors import TokenizerError


class PieceType(IntEnum):
    """What a piece is, numbered as in SentencePiece and in GGUF's tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4  # found in a text before all else
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    """One entry of the vocabulary; of two pairs, that with the higher score joins first."""

    text: str
    score: float
    type: PieceType


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BPE = 2


def write_model(
    pieces: Sequence[Piece], *, bos_id: int, eos_id: int, adds_prefix_space: bool
) -> bytes:
    """A BPE model that changes no text but for the space it may put in front.

    bos and eos are control tokens in it, whatever their type was. Ids that do not exist are left
    out: SentencePiece says then that it has none.
    """
    pieces = [
        piece._replace(type=PieceType.CONTROL)
        if i in (bos_id, eos_id) and piece.type != PieceType.UNKNOWN
        else piece
        for i, piece in enumerate(pieces)
    ]
    trainer = [
        _field(3, _BPE),
        _field(4, len(pieces)),
        _field(35, int(any(p.type == PieceType.BYTE for p in pieces))),  # byte_fallback
        *(_field(number, name) for number, name in _name_roles(pieces, bos_id, eos_id)),
    ]
    normalizer = [
        _field(1, "identity"),
        _field(3, int(adds_prefix_space)),
        _field(4, 0),  # remove_extra_whitespaces
        _field(5, 1),  # escape_whitespaces
    ]
    rows = [_field(1, p.text) + _field(2, p.score) + _field(3, int(p.type)) for p in pieces]
    parts = [*(_field(1, row) for row in rows),
             _field(2, b"".join(trainer)), _field(3, b"".join(normalizer))]  # fmt: skip
    return b"".join(parts)


def read_pieces(proto: bytes) -> list[Piece]:
    """The vocabulary in order of its ids. Raises TokenizerError if `proto` is cut."""
    try:
        return [_read_piece(value) for number, value in _read_fields(proto)
                if number == 1 and isinstance(value, bytes)]  # fmt: skip
    except (IndexError, struct.error, ValueError) as error:
        raise TokenizerError(f"the SentencePiece model is damaged ({error})") from error


def _name_roles(pieces: Sequence[Piece], bos_id: int, eos_id: int) -> Iterator[tuple[int, str]]:
    """The fields unk_piece, bos_piece and eos_piece."""
    unknown = [p.text for p in pieces if p.type == PieceType.UNKNOWN]
    yield from ((45, name) for name in unknown[:1])
    for number, token_id in ((46, bos_id), (47, eos_id)):
        if 0 <= token_id < len(pieces):
            yield number, pieces[token_id].text


def _read_piece(row: bytes) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for number, value in _read_fields(row):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = PieceType(value)
    return Piece(text, score, kind)


def _field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | _FIXED32) + struct.pack("<f", value)
    data = value.encode("utf-8") if isinstance(value, str) else value
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first: 300 -> AC 02."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"a number at byte {at} has no end")


def _read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and content of each field: an int of a varint, bytes of everything else."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _read_varint(data, at)
            yield number, value
            continue
        if wire not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"a field at byte {at} has the unknown kind {wire}")
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire, -1)
        if size < 0:
            size, at = _read_varint(data, at)
        if at + size > len(data):
            raise ValueError(f"a field at byte {at} goes beyond the end")
        yield number, data[at : at + size]
        at += size
