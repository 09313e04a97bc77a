"""From scores to a token: repetition penalty, temperature, top-k, top-p, min-p, and the draw.

Each filter is a function of logits (V,) fp32 and equals its namesake in transformers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from tramontane.engine.sampling_params import SamplingParams

GREEDY_BELOW = 1e-5  # at a lower temperature only scores this close to the best have a chance
NEVER = float("-inf")


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of the mask `seen` (V,) less likely: arXiv:1909.05858, section 4.1."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def scale_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, shifted so that the best is 0 and a tiny one cannot overflow."""
    return (logits - logits.max()) / temperature


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the k largest, and those equal to the k-th."""
    smallest_kept = torch.topk(logits, min(top_k, len(logits))).values[-1]
    return logits.masked_fill(logits < smallest_kept, NEVER)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens, each one before which less than or exactly `top_p` has come."""
    ordered, index = torch.sort(logits, descending=True, stable=True)
    probs = torch.softmax(ordered, dim=0)
    hidden = probs.cumsum(0) - probs > top_p
    return torch.empty_like(logits).scatter_(0, index, ordered.masked_fill(hidden, NEVER))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep the tokens at least `min_p` times as likely as the likeliest: arXiv:2407.01082."""
    probs = torch.softmax(logits, dim=0)
    return logits.masked_fill(probs < min_p * probs.max(), NEVER)


class Sampler:
    """Chooses the tokens of one request, with random numbers of its own.

    The same seed gives the same numbers whatever shares the batch and on whatever device: they are
    drawn on the CPU, one for each token.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Iterable[int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._params = params
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)
        self._seen: Tensor | None = None  # (V,) bool, kept only for the penalty
        if params.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(list(prompt_ids), dtype=torch.int64, device=device)] = True

    def sample(self, logits: Tensor) -> Tensor:
        """logits (V,) fp32 -> the chosen token id, an int64 scalar on the same device."""
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, self._params.repetition_penalty)
        if self._params.temperature < GREEDY_BELOW:
            token = logits.argmax()
        else:
            token = self._draw(torch.softmax(self.filter(logits), dim=0))
        if self._seen is not None:
            self._seen[token] = True
        return token

    def filter(self, logits: Tensor) -> Tensor:
        """Temperature and the filters; the softmax of the result is each token's chance."""
        params = self._params
        logits = scale_temperature(logits, params.temperature)
        if params.top_k > 0:
            logits = keep_top_k(logits, params.top_k)
        if params.top_p < 1:
            logits = keep_top_p(logits, params.top_p)
        if params.min_p > 0:
            logits = keep_min_p(logits, params.min_p)
        return logits

    def _draw(self, probs: Tensor) -> Tensor:
        """The first token at which the running sum of the chances passes a random number.

        In fp64, where number * total < total always holds, so that a token of chance 0 never comes.
        If the chances are NaN, which the engine reports, the result is still an id.
        """
        sums = probs.double().cumsum(0)
        number = torch.rand((), generator=self._random, dtype=torch.float64)
        token = torch.searchsorted(sums, number.to(sums.device) * sums[-1], right=True)
        return token.clamp(max=len(probs) - 1)
