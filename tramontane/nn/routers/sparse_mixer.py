"""SparseMixer (arXiv:2310.00811) and its second version, of GRIN (arXiv:2409.12136).

In training an expert is drawn, not chosen, and the gradient of the draw is estimated: by the
midpoint rule in the first version, by Heun's third-order rule in the second. Both see to it by
running the drawn expert at times with a part of its weight.
"""

import torch
from torch import Tensor, nn

from tramontane.config import ModelConfig, MoeConfig
from tramontane.config.moe import SparseMixerOptions
from tramontane.nn.router import Router, Routing


def mask_far_experts(scores: Tensor, left: Tensor, eps: float) -> Tensor:
    """-inf for those of `left` (T, E) that are further than 2 * eps below its largest.

    `left` are `scores` (T, E), perhaps with some at -inf already. The distance is relative to the
    larger one of the largest score and the expert's own, without its sign.
    """
    with torch.no_grad():
        largest = left.amax(-1, keepdim=True)  # (T, 1)
        is_far = (largest - scores) / torch.maximum(scores.abs(), largest) > 2 * eps
    return left.masked_fill(is_far, float("-inf"))


def scale_value(weight: Tensor, scale: Tensor, *, gain: float) -> Tensor:
    """`scale` times the weight, but `gain` times its gradient."""
    return gain * weight + ((scale - gain) * weight).detach()


class SparseMixerRouter(Router):
    """One expert, whose sum is scaled per channel by a learnt omega.

    An expert that is not the likeliest runs at half its weight half of the time; gradients count
    twice, for the draw and for the weight. Outside of training the likeliest is chosen.
    """

    is_random = True
    rest, whole_share, gain = 1 / 2, 1 / 2, 2.0

    def __init__(self, config: ModelConfig, moe: MoeConfig, *, layer: int = 0) -> None:
        super().__init__(config, moe, layer=layer)
        assert isinstance(moe.options, SparseMixerOptions)
        self.eps = moe.options.eps
        if "omega" in moe.options.parameters:
            self.omega = nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor) -> Routing:
        """x (T, D) -> Routing."""
        logits = self.score(x)
        left, slots = logits, []
        for _ in range(self.num_experts_per_tok):
            slots.append(self._choose(logits, left))
            left = left.scatter(1, slots[-1][1], float("-inf"))
        weights, experts = (torch.cat(part, dim=1) for part in zip(*slots, strict=True))
        return Routing(weights, experts, logits)

    def finish(self, y: Tensor) -> Tensor:
        """Scale by omega, (D,)."""
        return y * self.omega

    def _choose(self, logits: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts, (T, 1) each, of the experts whose scores are `left`."""
        masked = mask_far_experts(logits, left, self.eps)
        gates = torch.softmax(masked, dim=-1)
        if not self.training:
            experts = masked.argmax(-1, keepdim=True)
            return gates.gather(1, experts), experts
        assert self.draws is not None
        generator = self.draws.next_generator(logits.device)
        noise = torch.empty_like(masked).exponential_(generator=generator).log_()
        experts = (masked.detach() - noise).argmax(-1, keepdim=True)  # a draw from `gates`
        uniform = torch.empty_like(noise[:, :1]).uniform_(generator=generator)
        is_whole = (uniform < self.whole_share) | (experts == gates.argmax(-1, keepdim=True))
        return self.weigh(gates.gather(1, experts), is_whole), experts

    def weigh(self, gate: Tensor, is_whole: Tensor) -> Tensor:
        """The weight of a drawn expert, and its gradient, from its probability."""
        scale = torch.full_like(gate, self.rest).masked_fill(is_whole, 1.0)
        return scale_value(gate, scale, gain=self.gain)


class SparseMixerV2Router(SparseMixerRouter):
    """Two experts, the second drawn among the others, each weighted by its own softmax.

    One that is not the likeliest runs at a third of its weight three times of four.
    """

    rest, whole_share, gain = 1 / 3, 1 / 4, 1.0

    def finish(self, y: Tensor) -> Tensor:
        """y as it is: there is no omega."""
        return y
