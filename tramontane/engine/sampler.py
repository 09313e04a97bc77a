"""From scores to a token: repetition penalty, then filters and draw of `kernels/sampling.py`."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tramontane.engine.sampling_params import SamplingParams
from tramontane.kernels.sampling import GREEDY_BELOW, draw_token, filter_logits


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens of the mask `seen` (V,) less likely: arXiv:1909.05858, section 4.1."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


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
            number = torch.rand((), generator=self._random, dtype=torch.float64)
            token = draw_token(torch.softmax(self.filter(logits), dim=0), number.item())
        if self._seen is not None:
            self._seen[token] = True
        return token

    def filter(self, logits: Tensor) -> Tensor:
        """Temperature and the filters; the softmax of the result is each token's chance."""
        params = self._params
        return filter_logits(
            logits,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
        )
