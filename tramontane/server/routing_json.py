"""Which experts each token ran through, for clients: as JSON, and as vLLM's base64 of a .npy."""

import base64
import io
from collections.abc import Iterable, Sequence

import numpy as np

from tramontane.engine.completion import Completion, TextPiece
from tramontane.server.protocol.answers import RoutedPiece

_DIGITS = 4  # of a weight: a share of 1


def describe_piece(piece: TextPiece) -> RoutedPiece:
    """One token of an answer; its last has no experts, as it never ran."""
    return _describe(piece.text, piece.token_id, piece.selected_experts, piece.expert_weights)


def describe_pieces(pieces: Iterable[TextPiece]) -> list[RoutedPiece]:
    """Several, in order; their texts together are the answer's."""
    return [describe_piece(piece) for piece in pieces]


def describe_prompt(
    completion: Completion, prompt_ids: Sequence[int], token_texts: Sequence[str]
) -> list[RoutedPiece]:
    """The prompt's tokens. Needs a completion with the routing of all tokens."""
    experts, weights = completion.selected_experts, completion.expert_weights
    assert completion.routing_start == 0, completion.routing_start
    return [
        _describe(
            text, token_id, None if experts is None else experts[at],
            None if weights is None else weights[at],
        )
        for at, (text, token_id) in enumerate(zip(token_texts, prompt_ids, strict=True))
    ]  # fmt: skip


def encode_npy(completion: Completion, *, prompt_start: int = 0) -> str:
    """Base64 of a .npy of int16, (tokens - 1, layers, k), from prompt token `prompt_start` on."""
    experts = completion.selected_experts
    assert experts is not None, "the routing was not asked for"
    start = max(0, min(prompt_start, completion.num_prompt_tokens) - completion.routing_start)
    file = io.BytesIO()
    np.save(file, experts[start:].astype("<i2"), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _describe(
    text: str, token_id: int, experts: np.ndarray | None, weights: np.ndarray | None
) -> RoutedPiece:
    """(L, K) as lists per layer, without the -1 of a slot that has no expert."""
    if experts is None:
        return {"text": text, "token_id": token_id, "experts": None, "weights": None}
    assert weights is not None, "experts come with their weights"
    rows: list[list[int]] = experts.tolist()
    shares: list[list[float]] = weights.tolist()
    return {
        "text": text,
        "token_id": token_id,
        "experts": [[expert for expert in row if expert >= 0] for row in rows],
        "weights": [
            [round(share, _DIGITS) for share, expert in zip(layer, row, strict=True) if expert >= 0]
            for layer, row in zip(shares, rows, strict=True)
        ],
    }
