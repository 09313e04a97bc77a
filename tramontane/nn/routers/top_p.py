"""As many experts as a token needs: the fewest that have a probability of top_p together.

Huang et al., "Harder Tasks Need More Experts", arXiv:2403.07652.
"""

import torch
from torch import Tensor

from tramontane.config import ModelConfig, MoeConfig
from tramontane.config.moe import TopPOptions
from tramontane.nn.router import Router, Routing


class TopPRouter(Router):
    """Experts in falling order until their probabilities reach top_p; at most K, at least one.

    Weights are the probabilities among all experts, not renormalised.
    """

    def __init__(self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0) -> None:
        super().__init__(config, moe, layer=layer)
        assert isinstance(moe.options, TopPOptions)
        self.top_p = moe.options.top_p

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing whose K is the most that a token may use."""
        logits = self.score(x)
        ordered, experts = torch.sort(logits, dim=-1, descending=True, stable=True)
        probs = torch.softmax(ordered, dim=-1)  # (T, E)
        before = probs.detach().cumsum(-1) - probs.detach()
        used = (before < self.top_p)[:, : self.num_experts_per_tok]  # (T, K)
        used[:, 0] = True
        weights = probs[:, : self.num_experts_per_tok].where(used, 0.0)
        return Routing(weights, experts[:, : self.num_experts_per_tok].where(used, -1), logits)
