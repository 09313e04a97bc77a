"""What a request gives back: the answer, its parts as they come, and how long it took.

Shapes: T tokens, L layers, K experts per token.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from tramontane.errors import TramontaneError

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprob(NamedTuple):
    """Logarithm of the chance of a token, and the likeliest ones at its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TextPiece(NamedTuple):
    """A token of an answer, and the characters that it completed (perhaps none).

    `selected_experts` (L, K) int16 and `expert_weights` (L, K) fp32 are there if they were asked
    for; the last token of an answer never runs through the model and has none. Where a token ran
    through fewer than K experts, the rest is -1, of weight 0.
    """

    text: str
    token_id: int
    selected_experts: np.ndarray | None = None
    expert_weights: np.ndarray | None = None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True)
class Timings:
    """Seconds of one request: in the queue (part of the next), from its arrival to the first token,
    and from there to the last.
    """

    time_to_first_token: float
    decode_seconds: float
    queue_seconds: float = 0.0


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    `finish_reason` is "stop" (end of text or a stop), "length" (max_tokens, or the context is full)
    or "abort" (the caller left), or "error" (see `error`). `stop_reason` is the stop text or the
    stop id that ended it, None for the model's own end. `token_ids` includes the token that ended
    the answer. Of the prompt's tokens `num_cached_tokens` did not run: their keys and values were
    kept from an earlier request. `selected_experts` (tokens that ran, L, K) int16 and
    `expert_weights`, fp32, are those of tokens `routing_start` and on of prompt and answer, but the
    answer's last; None if not asked for or the model is dense. `prompt_logprobs` has None for the
    first token, which nothing precedes. `embedding` (D,) fp32 is the mean of the final hidden
    states of the prompt, if it was asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    timings: Timings
    selected_experts: np.ndarray | None = None
    expert_weights: np.ndarray | None = None
    routing_start: int = 0
    index: int = 0
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    embedding: np.ndarray | None = None
    error: TramontaneError | None = None
    others: tuple["Completion", ...] = ()  # the further answers of a request for several

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


class ChoiceUpdate(NamedTuple):
    """What is new in answer number `choice` of a request; its last update has the `completion`."""

    choice: int
    pieces: list[TextPiece]
    completion: Completion | None = None


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 and count > 0 else 0.0
