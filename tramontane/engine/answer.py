"""What has come out of a sequence so far: text, chances, experts, and when.

Shapes: T tokens, L layers, K experts per token, D dim.
"""

import time
from collections import deque
from collections.abc import Sequence as Items

import numpy as np

from tramontane.engine.completion import (
    Completion,
    FinishReason,
    TextPiece,
    Timings,
    TokenLogprob,
)
from tramontane.engine.request import Request
from tramontane.engine.text_output import TextOutput
from tramontane.errors import TramontaneError


class Answer:
    """Collects answer number `choice` of a request and builds its pieces and its completion.

    Tokens of `eos_ids` end it, and those that the request names.
    """

    def __init__(
        self,
        request: Request,
        text_output: TextOutput,
        *,
        eos_ids: frozenset[int],
        choice: int = 0,
    ) -> None:
        params = request.params
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        self.hidden_sum: np.ndarray | None = None  # (D,) float64
        self._num_summed = 0
        self._request, self._choice = request, choice
        self._num_prompt_tokens = len(request.prompt_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self.end_ids = self._stop_ids if params.ignore_eos else self._stop_ids | eos_ids
        self._text_output = text_output
        self._stop_reason: str | int | None = None
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._texts: list[str] = []  # what is certain, of each token
        self._num_taken = 0  # of them
        self._rest = ""  # the end of a last character, when no token is left to have it
        self._routing_start = 0 if request.routing == "all" else self._num_prompt_tokens
        self._routing: deque[tuple[np.ndarray, np.ndarray]] = deque()  # of each pass (T, L, K)
        self._num_routed = 0
        self._num_cached_tokens: int | None = None
        self._arrived_at = time.perf_counter()
        self._started_at: float | None = None
        self._first_token_at: float | None = None
        self._last_token_at = self._arrived_at

    def inherit_prompt(self, other: "Answer") -> None:
        """Take over what is known of the prompt from the answer that ran it."""
        self.prompt_logprobs = list(other.prompt_logprobs)
        self.hidden_sum, self._num_summed = other.hidden_sum, other._num_summed
        self._routing, self._num_routed = other._routing.copy(), other._num_routed

    def note_start(self, num_kept: int) -> None:
        """The sequence runs for the first time, or again, with so many tokens kept."""
        if self._started_at is None:
            self._started_at = time.perf_counter()
            self._num_cached_tokens = min(num_kept, self._num_prompt_tokens)

    def add_token(self, token_id: int, logprob: TokenLogprob | None) -> bool:
        """Note the next token; True if the answer ends with it."""
        self._token_ids.append(token_id)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._last_token_at = time.perf_counter()
        if self._first_token_at is None:
            self._first_token_at = self._last_token_at
        if token_id in self.end_ids:
            if token_id in self._stop_ids:
                self._stop_reason = token_id
            return True
        self._texts += self._text_output.push(token_id)
        if self._text_output.is_stopped:
            self._stop_reason = self._text_output.found_stop
            return True
        return False

    def finish(self) -> bool:
        """All text becomes certain; True if its last bytes completed a stop text."""
        was_stopped = self._text_output.is_stopped
        self._texts += self._text_output.finish()
        if extra := self._texts[len(self._token_ids) :]:
            del self._texts[len(self._token_ids) :]
            if self._num_taken < len(self._texts):
                self._texts[-1] += "".join(extra)
            else:
                self._rest = "".join(extra)
        self._texts += [""] * (len(self._token_ids) - len(self._texts))
        if self._text_output.is_stopped and not was_stopped:
            self._stop_reason = self._text_output.found_stop
            return True
        return False

    def record_routing(self, start: int, experts: np.ndarray, weights: np.ndarray) -> None:
        """Note the experts and weights (T, L, K) of the tokens at `start` and on, as far as wanted.

        What has run before, and runs again after a preemption, is known already.
        """
        skipped = self._routing_start + self._num_routed - start
        assert skipped >= 0, (start, self._routing_start, self._num_routed)
        if skipped < len(experts):
            # Others in the pass may have more experts per token: columns that none here has.
            is_used = np.flatnonzero((experts[skipped:] >= 0).any(axis=(0, 1)))
            width = 1 + int(is_used.max(initial=0))
            self._routing.append((experts[skipped:, :, :width], weights[skipped:, :, :width]))
            self._num_routed += len(experts) - skipped

    def add_hidden(self, start: int, hidden: np.ndarray) -> None:
        """Sum the final hidden states (T, D) float64 of the tokens at `start` and on: the prompt's.

        What has run before, and runs again after a preemption, is in the sum already.
        """
        new = hidden[self._num_summed - start : self._num_prompt_tokens - start]
        self._num_summed += len(new)
        total = new.sum(0)
        self.hidden_sum = total if self.hidden_sum is None else self.hidden_sum + total

    def take_pieces(self, *, with_experts: bool, limit: int | None) -> list[TextPiece]:
        """The tokens that are certain since the last call, no token after the first `limit`."""
        end = len(self._texts) if limit is None else min(len(self._texts), max(0, limit))
        pieces = [self._build_piece(i, with_experts) for i in range(self._num_taken, end)]
        self._num_taken = max(self._num_taken, end)
        if self._rest and limit is None:
            pieces.append(TextPiece(self._rest, self._token_ids[-1]))
            self._texts[-1] += self._rest
            self._rest = ""
        return pieces

    def build_completion(
        self, finish_reason: FinishReason, error: TramontaneError | None
    ) -> Completion:
        """The answer as it stands."""
        params = self._request.params
        experts, weights = self._join_routing()
        return Completion(
            text="".join(self._texts) + self._rest,
            token_ids=tuple(self._token_ids),
            finish_reason=finish_reason,
            num_prompt_tokens=self._num_prompt_tokens,
            timings=self._build_timings(),
            selected_experts=experts,
            expert_weights=weights,
            routing_start=self._routing_start,
            index=self._choice,
            stop_reason=self._stop_reason if finish_reason == "stop" else None,
            num_cached_tokens=self._num_cached_tokens or 0,
            logprobs=None if params.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=(
                None if params.prompt_logprobs is None else tuple(self.prompt_logprobs)
            ),
            embedding=self._build_embedding(),
            error=error,
        )

    def _build_piece(self, index: int, with_experts: bool) -> TextPiece:
        experts = weights = None
        if with_experts:
            experts, weights = self._find_experts(index)
        logprob = self._logprobs[index] if self._logprobs else None
        return TextPiece(self._texts[index], self._token_ids[index], experts, weights, logprob)

    def _find_experts(self, index: int) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Experts and weights (L, K) of a token of the answer; its pass is among the last ones."""
        at = self._num_prompt_tokens + index
        start = self._routing_start + self._num_routed
        for experts, weights in reversed(self._routing):
            start -= len(experts)
            if start <= at < start + len(experts):
                return experts[at - start], weights[at - start]
        return None, None

    def _join_routing(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not self._routing:
            return None, None
        width = max(experts.shape[-1] for experts, _ in self._routing)
        experts, weights = zip(*self._routing, strict=True)
        return _join(experts, width, filler=-1), _join(weights, width, filler=0)

    def _build_timings(self) -> Timings:
        first, started = self._first_token_at, self._started_at
        return Timings(
            time_to_first_token=0.0 if first is None else first - self._arrived_at,
            decode_seconds=0.0 if first is None else self._last_token_at - first,
            queue_seconds=0.0 if started is None else started - self._arrived_at,
        )

    def _build_embedding(self) -> np.ndarray | None:
        if self.hidden_sum is None:
            return None
        return (self.hidden_sum / self._num_prompt_tokens).astype(np.float32)


def _join(parts: Items[np.ndarray], width: int, *, filler: int) -> np.ndarray:
    """Parts (T, L, K) of any K as one (T, L, width)."""
    missing = [(0, 0), (0, 0)]
    wide = [
        np.pad(part, [*missing, (0, width - part.shape[-1])], constant_values=filler)
        for part in parts
    ]
    return np.concatenate(wide)
