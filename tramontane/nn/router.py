"""Routers: which experts see a token, and how much each counts.

Here are the seam and Mixtral's own router; the others that the literature has are in nn/routers/.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tramontane.config import ModelConfig, MoeConfig
from tramontane.kernels.dispatch import get_kernels
from tramontane.kernels.reference import widen
from tramontane.nn.draws import Draws

# Deviation 0.02. Not normal_: on the device "meta", where checkpoints are loaded, that imports the
# compiler, for a second.
INIT_BOUND = 0.02 * 3**0.5


class Routing(NamedTuple):
    """A router's decision for T tokens. A slot that is not used has expert -1 and weight 0.

    `chosen` are the experts before capacity dropped some of them, None where there is no capacity.
    """

    weights: Tensor  # (T, K) fp32; of top_k in falling order, summing to 1
    experts: Tensor  # (T, K) int64
    logits: Tensor  # (T, E) fp32
    chosen: Tensor | None = None  # (T, K) int64


class Router(nn.Module):
    """What all routers are: a weight (E, D) that scores experts, and a forward pass x -> Routing.

    Those that need random numbers in training have `draws`; outside of it none draws any.
    """

    def __init__(self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0) -> None:
        super().__init__()
        self.num_experts_per_tok = moe.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(moe.num_experts, config.dim))
        nn.init.uniform_(self.weight, -INIT_BOUND, INIT_BOUND)
        self.draws: Draws | None = Draws(layer) if self.is_random else None

    is_random = False

    def score(self, x: Tensor) -> Tensor:
        """The logits of x (T, D), (T, E): the product in the dtype of x, the rest in fp32."""
        return widen(get_kernels().linear(x, self.weight))

    def finish(self, y: Tensor) -> Tensor:
        """What becomes of the experts' sum y (T, D): nothing, in most routers."""
        return y


class TopKRouter(Router):
    """Mixtral's: softmax over the K largest logits (arXiv:2401.04088, section 2.1)."""

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Routing:
        """x (T, D) -> Routing; counts (T,) int64 from 1 to E: experts of each token, K the most.

        A dense layer's only expert is chosen alone, whatever the counts.
        """
        num_slots = self.num_experts_per_tok
        if len(self.weight) == 1:
            counts = None
        if counts is not None and len(counts):
            num_slots = int(counts.max())
        return Routing(*get_kernels().top_k_router(x, self.weight, num_slots, counts))
