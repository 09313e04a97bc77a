"""A `tokenizer.json` for a SentencePiece model: transformers reads that one without protobuf.

In the form of the one published with Mixtral 8x7B: a space before every text, pieces merged in the
order of their scores, bytes for characters without a piece.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tramontane.tokenizer.model_proto import Piece, PieceType
from tramontane.tokenizer.tokenizer import SPACE_MARK, Tokenizer

# Two vocabularies that agree on this have the same rules: spaces, runs of them, digits, bytes,
# names of control tokens, and what Unicode's normal forms would change.
_PROBE = "  <s>[INST] The  cafe\u0301 \ufb01n \u2460 12345\n\n\t\U0001f600\u65e5</s> <0x0A>\x00 x "
_SILENT = (PieceType.UNKNOWN, PieceType.CONTROL)


def build_tokenizer_json(
    pieces: Sequence[Piece], *, unk_id: int, bos_id: int | None, adds_prefix_space: bool
) -> str:
    """The content of the file; `bos_id` is put before each text unless it is None.

    After a user-defined piece ([REFERENCE_DOC_0] of Mistral's v3) the `tokenizers` library writes
    a space that SentencePiece does not; no other text has other ids.
    """
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    unescape = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    prepend = [{"type": "Prepend", "prepend": SPACE_MARK}] * adds_prefix_space
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * adds_prefix_space
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _list_added(pieces, unk_id),
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, escape]},
        "pre_tokenizer": None,
        "post_processor": None if bos_id is None else _add_bos(pieces[bos_id].text, bos_id),
        "decoder": {
            "type": "Sequence",
            "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unk_id].text,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: token_id for token_id, piece in enumerate(pieces)},
            "merges": derive_merges(pieces),
        },
    }
    return json.dumps(content, ensure_ascii=False)


def derive_merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, in order of precedence.

    SentencePiece joins the pair whose whole has the highest score, a list of merges the pair that
    comes first. Among equals the order is that of transformers: long halves first, the left ones
    before all, so that runs of spaces join alike.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.type == PieceType.NORMAL}
    merges = [
        (score, at, len(text), text)
        for text, score in scores.items()
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(text[:at], text[at:]) for _, at, _, text in merges]


def are_interchangeable(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether two forms of a vocabulary have the same ids, names, and rules about spaces."""
    return (
        first.vocab_size == second.vocab_size
        and first.control_ids == second.control_ids
        and (first.unk_id, first.bos_id, first.eos_id)
        == (second.unk_id, second.bos_id, second.eos_id)
        and first.describe_pieces() == second.describe_pieces()
        and first.encode(_PROBE) == second.encode(_PROBE)
        and first.encode_after_control(_PROBE) == second.encode_after_control(_PROBE)
    )


def _list_added(pieces: Sequence[Piece], unk_id: int) -> list[dict[str, Any]]:
    """Control tokens, and what a text is searched for before all else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": piece.text, **flags, "special": piece.type in _SILENT or i == unk_id}
        for i, piece in enumerate(pieces)
        if piece.type in (*_SILENT, PieceType.USER_DEFINED) or i == unk_id
    ]


def _add_bos(name: str, bos_id: int) -> Mapping[str, Any]:
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": text, "type_id": 0}} for text in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {name: {"id": name, "ids": [bos_id], "tokens": [name]}},
    }
