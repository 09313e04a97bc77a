"""Experts choose tokens (arXiv:2202.09368), for encoders: as in sparse upcycling's, 2212.05055."""

import torch
from torch import Tensor

from tramontane.config import ModelConfig, MoeConfig
from tramontane.config.moe import ExpertChoiceOptions
from tramontane.nn.router import Router, Routing
from tramontane.nn.routers.capacity import compute_capacity


class ExpertChoiceRouter(Router):
    """Each expert takes the tokens to which it is likeliest; load is even, tokens may get nothing.

    Slot k of a token is expert k, or empty, so K = E. x (T, D) is one sequence.
    """

    def __init__(self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0) -> None:
        super().__init__(config, moe, layer=layer)
        assert isinstance(moe.options, ExpertChoiceOptions)
        self.options = moe.options

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing."""
        logits = self.score(x)
        num_tokens, num_experts = logits.shape
        probs = torch.softmax(logits, dim=-1)  # (T, E)
        capacity = compute_capacity(num_tokens, num_experts, self.options.capacity_factor)
        order = torch.argsort(probs.detach(), dim=0, descending=True, stable=True)
        is_taken = torch.zeros_like(probs, dtype=torch.bool).scatter(0, order[:capacity], True)
        weights = probs.where(is_taken, 0.0)
        if self.options.normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-9)
        slots = torch.arange(num_experts, device=x.device).expand_as(is_taken)
        return Routing(weights, slots.where(is_taken, -1), logits)
