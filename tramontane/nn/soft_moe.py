"""Soft MoE (arXiv:2308.00951): experts run on mixtures of tokens, not on tokens; for encoders."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tramontane.config import ModelConfig, MoeConfig
from tramontane.config.moe import SoftOptions
from tramontane.errors import ConfigError
from tramontane.nn.experts import GroupedExperts
from tramontane.nn.router import INIT_BOUND, Routing


class SoftMoe(nn.Module):
    """y = C experts(D^T x): D and C are softmaxes of x Phi over tokens and over slots.

    Each expert has slots_per_expert slots, so the work does not depend on the number of tokens;
    nothing is dropped and all is differentiable. Raises ConfigError for a causal model.
    """

    expert_of_slot: Tensor  # (P, 1) int64

    def __init__(self, config: ModelConfig, moe: MoeConfig, *, causal: bool) -> None:
        super().__init__()
        if causal:
            moe.require_causal()
        if not isinstance(moe.options, SoftOptions):
            raise ConfigError(f"moe.router is {moe.router!r}; SoftMoe is for 'soft'")
        num_slots = moe.num_experts * moe.options.slots_per_expert
        self.phi = nn.Parameter(torch.empty(config.dim, num_slots))
        nn.init.uniform_(self.phi, -INIT_BOUND, INIT_BOUND)
        self.scale = nn.Parameter(torch.ones(()))
        self.experts = GroupedExperts(config, moe)
        expert_of_slot = torch.arange(num_slots) // moe.options.slots_per_expert
        self.register_buffer("expert_of_slot", expert_of_slot[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D), B sequences of T tokens -> (B, T, D)."""
        logits = self.score(x)  # (B, T, P) for P slots
        dispatch = torch.softmax(logits, dim=1)
        slots = dispatch.transpose(1, 2) @ x  # (B, P, D)
        combine = torch.softmax(logits, dim=2)
        return combine @ self._run_experts(slots)

    def score(self, x: Tensor) -> Tensor:
        """Logits of each token and slot, (B, T, P): cosines, times a learnt scale."""
        return F.normalize(x, dim=-1) @ (self.scale * F.normalize(self.phi, dim=0))

    def _run_experts(self, slots: Tensor) -> Tensor:
        """Each expert on its own slots, (B, P, D) -> (B, P, D)."""
        experts = self.expert_of_slot.repeat(len(slots), 1)  # (B * P, 1)
        rows = slots.flatten(0, 1)  # (B * P, D)
        weights = torch.ones_like(experts, dtype=torch.promote_types(rows.dtype, torch.float32))
        y: Tensor = self.experts(rows, Routing(weights, experts, weights))
        return y.view_as(slots)
