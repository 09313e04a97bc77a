"""What a request gives back: the answer, its parts as they come, and how long it took."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


class TextPiece(NamedTuple):
    """Text of one token, and the experts (L, K) int16 that it chose, if they were asked for.

    The last token of an answer never runs through the model, so its experts are None.
    """

    text: str
    token_id: int
    selected_experts: np.ndarray | None


@dataclass(frozen=True)
class Timings:
    """Seconds of one request: from its arrival to the first token, and from there to the last."""

    time_to_first_token: float
    decode_seconds: float


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    `finish_reason` is "stop" (end of text or a stop text), "length" (max_tokens, or the context is
    full) or "abort" (the caller left). `token_ids` includes the token that ended the answer.
    `selected_experts` (tokens that ran, L, K) int16 covers the prompt and the answer but its last
    token; None if it was not asked for or the model is dense.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    timings: Timings
    selected_experts: np.ndarray | None = None

    @property
    def num_completion_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids)

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second until the first token came; 0 if none came."""
        return _rate(self.num_prompt_tokens, self.timings.time_to_first_token)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first; 0 if there was only one."""
        return _rate(self.num_completion_tokens - 1, self.timings.decode_seconds)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0
