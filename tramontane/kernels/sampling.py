"""The steps from scores to a token, of one row: temperature, top-k, top-p, min-p, and the draw.

Each filter is a function of logits (V,) fp32 and equals its namesake in transformers.
"""

import torch
from torch import Tensor

GREEDY_BELOW = 1e-5  # at a lower temperature only scores this close to the best have a chance
NEVER = float("-inf")


def scale_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by the temperature, shifted so that the best is 0 and a tiny one cannot overflow."""
    return (logits - logits.max()) / temperature


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the k largest, and those equal to the k-th."""
    smallest_kept = torch.topk(logits, min(top_k, len(logits))).values[-1]
    return logits.masked_fill(logits < smallest_kept, NEVER)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest, and each token before which less than `top_p` has come.

    Of tokens that are equally likely the lower id comes first.
    """
    ordered, index = torch.sort(logits, descending=True, stable=True)
    probs = torch.softmax(ordered, dim=0)
    hidden = probs.cumsum(0) - probs >= top_p
    hidden[0] = False
    return torch.empty_like(logits).scatter_(0, index, ordered.masked_fill(hidden, NEVER))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep the tokens at least `min_p` times as likely as the likeliest: arXiv:2407.01082."""
    probs = torch.softmax(logits, dim=0)
    return logits.masked_fill(probs < min_p * probs.max(), NEVER)


def filter_logits(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """All of them in their order; the softmax of the result is each token's chance."""
    logits = scale_temperature(logits, temperature)
    if top_k > 0:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
    return logits


def draw_token(chances: Tensor, number: float) -> Tensor:
    """The first token at which the running sum of the chances (V,) passes number * their sum.

    In fp64, where number * total < total always holds for a number from 0 up to but not 1, so that
    a token of chance 0 never comes. If the chances are NaN the result is still an id.
    """
    sums = chances.double().cumsum(0)
    token = torch.searchsorted(sums, number * sums[-1], right=True)
    return token.clamp(max=len(chances) - 1)
