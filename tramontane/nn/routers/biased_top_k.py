"""Balance without a loss: a bias per expert that only the choice sees (arXiv:2408.15664)."""

from collections.abc import Callable

import torch
from torch import Tensor

from tramontane.config import ModelConfig, MoeConfig
from tramontane.kernels.reference import top_k_routing
from tramontane.nn.router import Router, Routing


class BiasedTopKRouter(Router):
    """Top-k of logits + bias; weights are the softmax of the chosen logits without it.

    Training moves the bias of an expert up when it got too few tokens, down when too many.
    """

    expert_bias: Tensor  # (E,) fp32 whatever the dtype of the model: its steps are small

    def __init__(self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0) -> None:
        super().__init__(config, moe, layer=layer)
        self.register_buffer("expert_bias", torch.zeros(moe.num_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing; slots in falling order of logit + bias."""
        logits = self.score(x)
        _, experts = top_k_routing(logits.detach() + self.expert_bias, self.num_experts_per_tok)
        return Routing(torch.softmax(logits.gather(1, experts), dim=-1), experts, logits)

    @torch.no_grad()
    def move_bias(self, tokens_per_expert: Tensor, *, rate: float) -> None:
        """One step of size `rate` for each expert, by the sign of what its load (E,) lacks."""
        load = tokens_per_expert.to(self.expert_bias)
        self.expert_bias += rate * torch.sign(load.mean() - load)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BiasedTopKRouter":
        """Move and cast as any module, but keep the bias in fp32."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        device = self.expert_bias.device
        self.expert_bias = self.expert_bias.float() if bias.is_meta else bias.to(device)
        return self
