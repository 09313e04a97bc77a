"""Tokens that only fill up the rows of a GGUF's embeddings, which llama.cpp counts by its tokens.

Unused ones at the end, named after their ids as by llama.cpp's own converter: [PAD259], [PAD260].
"""

from collections.abc import Sequence
from typing import Any

from tramontane.tokenizer.model_proto import PieceType

_NAME, _SCORE = "[PAD{}]", -1e4


def add_padding(described: dict[str, Any], num_rows: int) -> None:
    """Lengthens the lists of a vocabulary (tokens, token_type, scores) to `num_rows`."""
    missing = range(len(described["tokens"]), num_rows)
    filling: dict[str, list[Any]] = {
        "tokens": [_NAME.format(i) for i in missing],
        "token_type": [int(PieceType.UNUSED)] * len(missing),
        "scores": [_SCORE] * len(missing),
    }
    for key in described.keys() & filling.keys():
        described[key] = [*described[key], *filling[key]]


def count_tokens(tokens: Sequence[str], types: Any) -> int:
    """How many tokens there are before those that fill up; `types` may be missing or damaged."""
    count = len(tokens)
    if not hasattr(types, "__len__") or len(types) != count or isinstance(types, str | bytes):
        return count
    while count and types[count - 1] == PieceType.UNUSED:
        if tokens[count - 1] != _NAME.format(count - 1):
            break
        count -= 1
    return count
