"""A limit to the tokens of one expert: what is over it is dropped, and passes by unchanged.

Switch Transformers, arXiv:2101.03961, section 2.2; GShard, arXiv:2006.16668, algorithm 1.
"""

import math

import torch
from torch import Tensor

from tramontane.nn.router import Routing


def compute_capacity(num_tokens: int, num_experts: int, factor: float) -> int:
    """Tokens that one expert takes: factor * tokens / experts, rounded up, so at least one."""
    return math.ceil(factor * num_tokens / num_experts - 1e-9)  # 0.28 * 25 is not above 7


def limit_to_capacity(routing: Routing, factor: float) -> Routing:
    """Empty the slots of tokens that come too late for their expert; a factor of 0 is no limit.

    All first choices come before all second ones, each in the order of the tokens.
    """
    if factor == 0:
        return routing
    num_tokens, num_experts = routing.logits.shape
    capacity = compute_capacity(num_tokens, num_experts, factor)
    kept = _rank_slots(routing.experts, num_experts) < capacity
    return Routing(
        routing.weights.where(kept, 0.0),
        routing.experts.where(kept, -1),
        routing.logits,
        routing.experts,
    )


def _rank_slots(experts: Tensor, num_experts: int) -> Tensor:
    """How many slots of the same expert stand before each of experts (T, K); -1 is nobody's.

    Experts [[1, 0], [1, 1]] -> ranks [[0, 0], [1, 2]].
    """
    by_slot = experts.t().flatten()  # (K * T,)
    is_expert = by_slot[:, None] == torch.arange(num_experts, device=experts.device)  # (K * T, E)
    before = is_expert.cumsum(0) - 1  # (K * T, E)
    ranks = before.masked_fill(~is_expert, 0).sum(1)  # (K * T,)
    return ranks.unflatten(0, experts.t().shape).t()
