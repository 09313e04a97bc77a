"""The chances of tokens, as the model gives them: before temperature, penalties or constraints."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tramontane.engine.completion import TokenLogprob

_MAX_NUMBERS = 2**20  # of which a second copy is made at a time: 4 MiB


def compute_logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """For each row of scores fp32 (R, V) the logarithm of the chance of its token (R,), and the
    `num_top` likeliest tokens, best first, the lower id first of those equally likely.

    Natural logarithms, by log_softmax in fp32; no row's depend on the rows beside it.
    """
    found: list[TokenLogprob] = []
    num_rows = max(1, _MAX_NUMBERS // logits.shape[1])
    for start in range(0, len(token_ids), num_rows):
        rows = logits[start : start + num_rows]
        found += _compute_rows(rows, token_ids[start : start + num_rows], num_top)
    return found


def _compute_rows(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = torch.tensor(token_ids, device=logits.device)[:, None]
    values = logprobs.gather(1, chosen)[:, 0].tolist()
    if num_top == 0:
        return [TokenLogprob(i, v, ()) for i, v in zip(token_ids, values, strict=True)]
    top_ids = _find_top(logits, num_top)
    top_values = logprobs.gather(1, top_ids).tolist()
    return [
        TokenLogprob(i, v, tuple(zip(ids, of_ids, strict=True)))
        for i, v, ids, of_ids in zip(token_ids, values, top_ids.tolist(), top_values, strict=True)
    ]


def _find_top(logits: Tensor, num_top: int) -> Tensor:
    """Ids of the highest scores of each row, int64 (R, k); of equal scores the lower ids first."""
    num_top = min(num_top, logits.shape[1])
    values, ids = torch.topk(logits, min(num_top + 1, logits.shape[1]))
    is_tied = (values[:, :-1] <= values[:, 1:]).any(dim=1)  # topk promises no order among equals
    ids = ids[:, :num_top]
    for row in is_tied.nonzero()[:, 0].tolist():
        least = values[row, num_top - 1]
        candidates = (~(logits[row] < least)).nonzero()[:, 0]
        order = torch.sort(logits[row, candidates], descending=True, stable=True).indices
        ids[row] = candidates[order[:num_top]]
    return ids
