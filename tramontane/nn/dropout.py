"""Dropout (Srivastava et al. 2014) on what each part adds to the residual stream, in training."""

import torch
from torch import Tensor, nn

from tramontane.nn.draws import Draws


class Dropout(nn.Module):
    """In training sets a share `rate` of the values to zero and scales up the rest.

    The model's layers hold it with rate 0; a run that wants it calls `set_dropout`.
    """

    def __init__(self, *stream: int) -> None:
        super().__init__()
        self.rate = 0.0
        self.draws = Draws(*stream)

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape -> the same, with the same mean."""
        if not self.training or self.rate == 0:
            return x
        # 16 random bits a value; bernoulli_ with a generator of its own takes six times as long
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=self.draws.next_generator(x.device))
        levels = words.view(torch.int16)[: x.numel()].view_as(x)  # -2^15 .. 2^15 - 1
        dropped = levels < round(self.rate * 2**16) - 2**15
        return x.masked_fill(dropped, 0) / (1 - self.rate)


def set_dropout(model: nn.Module, rate: float) -> None:
    """Let all of `model` drop a share `rate` of the values in training, 0 <= rate < 1."""
    assert 0 <= rate < 1, rate
    for module in model.modules():
        if isinstance(module, Dropout):
            module.rate = rate
