"""`usage` and its cost meter: what a request took, counted by formulae (docs/serving.md).

Tokens that ran: those of the prompt that were not cached, and of each answer but its last.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from tramontane.engine.completion import Completion
from tramontane.server.ports import ServedModel
from tramontane.server.protocol.answers import Cost, Usage

_WINDOW = 60.0  # seconds over which the load is measured


class CostMeter:
    """`price_per_hour` in dollars; without it there is no price per token."""

    def __init__(
        self, model: ServedModel, *, price_per_hour: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._model, self._price_per_hour, self._clock = model, price_per_hour, clock
        self._generated: deque[tuple[float, int]] = deque()
        self._first_at: float | None = None

    def note_tokens(self, count: int) -> None:
        """Tokens of answers that just came, for the price at the present load."""
        if self._price_per_hour is not None:
            now = self._clock()
            self._first_at = now if self._first_at is None else self._first_at
            self._generated.append((now, count))
            self._forget_old(now)

    def build_usage(
        self, choices: Sequence[Completion], *, experts_per_token: int | None = None
    ) -> Usage:
        """Of one request: `choices` of the same prompt follow each other, the first ran it."""
        prompts = [c for c in choices if c.index == 0]
        num_prompt = sum(c.num_prompt_tokens for c in prompts)
        num_cached = sum(c.num_cached_tokens for c in prompts)
        num_generated = sum(c.num_completion_tokens for c in choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": num_cached},
            "cost": self._build_cost(choices, num_cached, experts_per_token),
        }

    def _build_cost(
        self, choices: Sequence[Completion], num_cached: int, experts_per_token: int | None
    ) -> Cost:
        active = count_active(self._model, experts_per_token)
        spans = [_find_span(completion) for completion in choices]
        cost: Cost = {
            "active_parameters": active,
            "flops": sum(count_flops(self._model, active, *span) for span in spans),
            "expert_bytes_read": sum(
                count_expert_bytes(self._model, completion, *span, experts_per_token)
                for completion, span in zip(choices, spans, strict=True)
            ),
            "cached_tokens": num_cached,
        }
        if (price := self._find_price()) is not None:
            cost["usd_per_million_tokens"] = price
        return cost

    def _find_price(self) -> float | None:
        """Dollars per million tokens of answers at the rate of the last minute."""
        if self._price_per_hour is None or self._first_at is None:
            return None
        now = self._clock()
        self._forget_old(now)
        seconds = min(_WINDOW, now - self._first_at)
        tokens = sum(count for _, count in self._generated)
        if not tokens or seconds <= 0:
            return None
        return self._price_per_hour / 3600 * seconds / tokens * 1e6

    def _forget_old(self, now: float) -> None:
        while self._generated and self._generated[0][0] < now - _WINDOW:
            self._generated.popleft()


def count_active(model: ServedModel, experts_per_token: int | None) -> int:
    """Parameters that work on each token, with as many experts as the request asked for."""
    if experts_per_token is None or model.num_experts_per_tok is None:
        return model.num_active_parameters
    usual = model.num_experts_per_tok
    more = sum(min(experts_per_token, n) - min(usual, n) for n in model.layer_experts)
    return model.num_active_parameters + more * model.num_expert_parameters


def count_flops(model: ServedModel, active: int, start: int, end: int) -> int:
    """Of the tokens start..end: two per parameter, and four per layer, dimension and token seen."""
    num_seen = (end * (end + 1) - start * (start + 1)) // 2
    return 2 * active * (end - start) + 4 * model.n_layers * model.dim * num_seen


def count_expert_bytes(
    model: ServedModel, completion: Completion, start: int, end: int,
    experts_per_token: int | None = None,
) -> int:  # fmt: skip
    """Weights of experts that this request alone would read.

    The prompt's tokens share what they read: of E experts, T tokens that each choose K reach
    E (1 - (1 - K/E)^T) if all choices are equally likely. Each token of the answer reads K. Where
    the routing is known, the experts are counted instead.
    """
    if model.num_experts_per_tok is None:
        return 0
    num_per_token = experts_per_token or model.num_experts_per_tok
    num_prompt = max(0, completion.num_prompt_tokens - start)
    num_answer = end - start - num_prompt
    routed = completion.selected_experts
    if routed is not None and completion.routing_start <= start:
        mine = routed[start - completion.routing_start :]
        reads = _count_distinct(mine[:num_prompt]) + int((mine[num_prompt:] >= 0).sum())
        return reads * model.weight_bytes_per_expert
    num_read = 0.0
    for num_experts in model.layer_experts:
        chosen = min(num_per_token, num_experts)
        missed = (1 - chosen / num_experts) ** num_prompt
        num_read += num_experts * (1 - missed) + num_answer * chosen
    return round(num_read * model.weight_bytes_per_expert)


def _find_span(completion: Completion) -> tuple[int, int]:
    """Positions start..end that ran for this choice; the first one ran the prompt."""
    first = completion.num_cached_tokens if completion.index == 0 else completion.num_prompt_tokens
    end = completion.num_prompt_tokens + max(0, completion.num_completion_tokens - 1)
    return min(first, end), end


def _count_distinct(experts: np.ndarray) -> int:
    """Experts (T, L, K) that at least one token reached, summed over the layers."""
    return sum(len(np.unique(layer[layer >= 0])) for layer in np.moveaxis(experts, 1, 0))
