"""What runs in place of linear layers and experts when their weights are packed. For inference.

T tokens, D dim, F hidden_dim, E experts, N rows and K columns of a matrix.
"""

import torch
from torch import Tensor, nn

from tramontane.kernels.dispatch import get_kernels
from tramontane.kernels.packing import PackedWeight
from tramontane.nn.router import Routing
from tramontane.quant.formats import QuantFormat


class PackedMatrix(nn.Module):
    """The buffers of a packed matrix (N, K), or of a stack of E; not parameters, nothing trains.

    They are empty until `store` or a loader fills them, and keep their dtypes: a model that has
    packed weights is not to be cast.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], format: QuantFormat, *, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.shape, self.format = tuple(shape), format
        for suffix, spec in format.list_tensors(shape).items():
            self.register_buffer(suffix, torch.empty(spec.shape, dtype=spec.dtype, device=device))
        if format.symmetric:
            self.register_buffer("zeros", None)

    @property
    def packed(self) -> PackedWeight:
        """What the kernels take."""
        return PackedWeight(self.qweight, self.scales, self.zeros, self.format.bits, self.shape[-2])

    def store(self, weight: PackedWeight, expert: int | None = None) -> None:
        """Copy one matrix to its place, that of `expert` in a stack."""
        place = self.packed if expert is None else self.packed.select(expert)
        place.qweight.copy_(weight.qweight)
        place.scales.copy_(weight.scales)
        if place.zeros is not None and weight.zeros is not None:
            place.zeros.copy_(weight.zeros)

    def extra_repr(self) -> str:
        """Format and shape."""
        return f"{self.format.name}, {' x '.join(map(str, self.shape))}"


class QuantizedLinear(PackedMatrix):
    """A linear layer without bias; its input is rounded to 8 bits in the groups of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in the dtype of x."""
        y = get_kernels().quantized_linear(x.reshape(-1, x.shape[-1]), self.packed)
        return y.view(*x.shape[:-1], y.shape[-1])


class QuantizedExperts(nn.Module):
    """The experts of one layer under `nn.moe.MoeLayer`: stacks w1, w3 of (F, D) and w2 of (D, F).

    Each stack has a format of its own; all share the activations' rounding to 8 bits.
    """

    def __init__(self, w1: PackedMatrix, w2: PackedMatrix, w3: PackedMatrix) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = w1, w2, w3

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (T, D) -> the weighted sum of each token's experts, (T, D)."""
        return get_kernels().quantized_experts(
            x, routing.weights, routing.experts, self.w1.packed, self.w2.packed, self.w3.packed
        )
