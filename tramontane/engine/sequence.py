"""One request on its way: tokens, text, and whether and why it has ended. Needs no torch."""

import time
from collections import deque
from collections.abc import Sequence as Items
from typing import Any

import numpy as np

from tramontane.engine.completion import Completion, FinishReason, TextPiece, Timings
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.text_output import Segment, TextOutput
from tramontane.errors import ContextError, RequestError


class Sequence:
    """Prompt and answer of one request. `num_cached_tokens` of its tokens have run.

    Raises RequestError if the prompt has no token, and ContextError if it leaves no room for an
    answer within `max_seq_len`.
    """

    def __init__(
        self,
        prompt_ids: Items[int],
        params: SamplingParams,
        *,
        text_output: TextOutput,
        eos_ids: frozenset[int],
        max_seq_len: int,
        collect_routing: bool = False,
        matcher: Any = None,
    ) -> None:
        _check_prompt_length(len(prompt_ids), max_seq_len)
        self.token_ids = list(prompt_ids)
        self.num_prompt_tokens = len(prompt_ids)
        self.num_cached_tokens = 0
        self.max_len = min(max_seq_len, len(prompt_ids) + params.max_tokens)
        self.params = params
        self.collect_routing = collect_routing
        self.finish_reason: FinishReason | None = None
        self._text_output = text_output
        self.matcher = matcher
        self.eos_ids = self._eos_ids = eos_ids
        self._waiting_segments: deque[Segment] = deque()
        self._text: list[str] = []
        self._routing: list[np.ndarray] = []  # (T, L, K) of each forward pass
        self._arrived_at = time.perf_counter()
        self._first_token_at: float | None = None
        self._last_token_at = self._arrived_at

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that have not run yet: the rest of the prompt, then one at a time."""
        return len(self.token_ids) - self.num_cached_tokens

    @property
    def is_finished(self) -> bool:
        """Whether the answer has ended."""
        return self.finish_reason is not None

    def advance(self, num_tokens: int, *, selected_experts: np.ndarray | None = None) -> None:
        """Note that the next `num_tokens` have run, with the experts (T, L, K) that they chose."""
        assert num_tokens <= self.num_pending_tokens, (num_tokens, self.num_pending_tokens)
        self.num_cached_tokens += num_tokens
        if selected_experts is not None:
            self._routing.append(selected_experts)

    def append_token(self, token_id: int) -> None:
        """Add a token of the answer and see whether it ends here."""
        assert not self.is_finished, self.finish_reason
        self.token_ids.append(token_id)
        self._last_token_at = time.perf_counter()
        if self._first_token_at is None:
            self._first_token_at = self._last_token_at
        if token_id in self._eos_ids:
            self.finish("stop")
            return
        self._add_text(self._text_output.push(token_id))
        if self._text_output.is_stopped:
            self.finish("stop")
        elif len(self.token_ids) == self.max_len:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """End the answer; text that was held back comes out."""
        self._add_text(self._text_output.finish())
        # A stop text may have been completed by the last bytes.
        self.finish_reason = "stop" if self._text_output.is_stopped else reason

    def take_pieces(self, *, with_experts: bool = False) -> list[TextPiece]:
        """The text that has become certain since the last call, token by token.

        With experts, a token waits until it has run itself, one pass after it was chosen.
        """
        pieces = []
        while self._waiting_segments:
            at = self.num_prompt_tokens + self._waiting_segments[0].token_index
            if with_experts and at >= self.num_cached_tokens and not self.is_finished:
                break
            text = self._waiting_segments.popleft().text
            experts = self._find_experts(at) if with_experts else None
            pieces.append(TextPiece(text, self.token_ids[at], experts))
        return pieces

    def build_completion(self) -> Completion:
        """The answer as it stands; one that has not ended counts as aborted."""
        first = self._first_token_at
        timings = Timings(
            0.0 if first is None else first - self._arrived_at,
            0.0 if first is None else self._last_token_at - first,
        )
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self.token_ids[self.num_prompt_tokens :]),
            finish_reason=self.finish_reason or "abort",
            num_prompt_tokens=self.num_prompt_tokens,
            timings=timings,
            selected_experts=np.concatenate(self._routing) if self._routing else None,
        )

    def _add_text(self, segments: list[Segment]) -> None:
        self._waiting_segments.extend(segments)
        self._text.extend(segment.text for segment in segments)

    def _find_experts(self, at: int) -> np.ndarray | None:
        """Experts (L, K) of the token at this position; its pass is among the last ones."""
        start = self.num_cached_tokens
        for experts in reversed(self._routing):
            start -= len(experts)
            if start <= at < start + len(experts):
                return experts[at - start]
        return None


def _check_prompt_length(num_prompt_tokens: int, max_seq_len: int) -> None:
    if num_prompt_tokens == 0:
        raise RequestError("the prompt has no token; it needs at least one")
    if num_prompt_tokens >= max_seq_len:
        raise ContextError(
            f"the prompt has {num_prompt_tokens} tokens, but the context of this model holds "
            f"{max_seq_len}, answer included; shorten the prompt to at most {max_seq_len - 1}"
        )
