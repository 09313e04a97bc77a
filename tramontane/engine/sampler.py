"""From scores to a token: repetition penalty, temperature, top-k, top-p, min-p, and the draw.

Each filter is a function of logits (V,) fp32 and equals its namesake in transformers.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

import random


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
    def __init__(
        self, params, *, prompt_ids, vocab_size, eos_ids=frozenset(), index=0, matcher=None
    ):
        self._params = params
        self._random = random.Random(None if params.seed is None else params.seed + index)
        self._prompt = list(prompt_ids)
        self._answer = []
        self._vocab = vocab_size
        self._eos = eos_ids
        self.is_exhausted = False

    @property
    def is_plain(self):
        p = self._params
        return (
            p.repetition_penalty == 1
            and not p.presence_penalty
            and not p.frequency_penalty
            and not p.logit_bias
            and not p.allowed_token_ids
            and len(self._answer) >= p.min_tokens
        )

    def edit(self, logits):
        p = self._params
        logits = logits.clone()
        if p.repetition_penalty != 1:
            seen = torch.zeros(len(logits), dtype=torch.bool)
            seen[torch.tensor(self._prompt + self._answer)] = True
            logits = penalize_repetition(logits, seen, p.repetition_penalty)
        for t in set(self._answer):
            logits[t] -= p.presence_penalty + p.frequency_penalty * self._answer.count(t)
        for t, b in p.logit_bias.items():
            logits[t] += b
        if len(self._answer) < p.min_tokens:
            logits[list(self._eos)] = NEVER
        return logits

    def accept(self, token_id):
        self._answer.append(token_id)

    def draw_number(self):
        return self._random.random()


def sample_rows(logits, samplers, *, best=None):
    out = []
    for row, s in zip(logits, samplers):
        p = s._params
        if p.is_greedy:
            out.append(int(row.argmax()))
            continue
        x = scale_temperature(row, p.temperature)
        if p.top_k > 0:
            x = keep_top_k(x, p.top_k)
        if p.top_p < 1:
            x = keep_top_p(x, p.top_p)
        if p.min_p > 0:
            x = keep_min_p(x, p.min_p)
        sums = torch.softmax(x, 0).double().cumsum(0)
        n = s.draw_number() * sums[-1]
        out.append(int(torch.searchsorted(sums, n, right=True).clamp(max=len(row) - 1)))
    return out
