"""Linear layers whose product is one of our kernels."""

from torch import Tensor, nn

from tramontane.kernels.dispatch import get_kernels


class Linear(nn.Linear):
    """x W^T without a bias: torch's layer, and its parameters, around `kernels.linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features)."""
        return get_kernels().linear(input, self.weight)
