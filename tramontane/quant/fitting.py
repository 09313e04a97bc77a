"""Scales and whole numbers for a matrix: round-to-nearest, the first of the fitters.

Symmetric 4 bits are llama.cpp's Q4_0 (github.com/ggml-org/llama.cpp, ggml-quants.c): of 16 numbers
-8 .. 7 the value of largest magnitude gets -8, whatever its sign.
"""

import math

import torch
from torch import Tensor

from tramontane.kernels.packing import PackedWeight, default_zero, dequantize
from tramontane.quant.formats import Fitted, Fitter, QuantFormat, pack_rows

_ROWS_PER_STEP = 256  # of a matrix, when its error is measured


def round_to_nearest(weight: Tensor, format: QuantFormat, /) -> Fitted:
    """Each value (N, K) to the nearest step of its group's grid, which spans all of the group.

    No value is off by more than half a step; but one of 4 symmetric bits, near the size of the
    group's extreme and of the other sign, may be off by a whole one: -8 exists, 8 does not.
    """
    groups = weight.float().unflatten(-1, (-1, format.group_size))  # (N, K/g, g)
    scales, zeros = _choose_grid(groups, format)  # (N, K/g) each
    steps = scales.float().masked_fill(scales == 0, 1.0)[..., None]
    q = torch.round(groups / steps).add_(zeros[..., None]).clamp_(0, 2**format.bits - 1)
    return Fitted(
        q.to(torch.uint8).flatten(-2), scales, None if format.symmetric else zeros.to(torch.uint8)
    )


def quantize_weight(
    weight: Tensor, format: QuantFormat, *, fitter: Fitter = round_to_nearest
) -> PackedWeight:
    """A matrix (N, K) of any float as packed weight, some rows at a time.

    Raises ConfigError if K is no multiple of the group size, or on values beyond the fp16 scales.
    """
    rows, columns = weight.shape
    return pack_rows((rows, columns), format, lambda part: fitter(weight[part].float(), format))


def measure_relative_error(weight: Tensor, packed: PackedWeight) -> float:
    """Root mean square of what packing changed, relative to that of the weight (N, K)."""
    squares = torch.zeros(2, dtype=torch.float64)  # of the change, of the weight
    for begin in range(0, len(weight), _ROWS_PER_STEP):
        rows = weight[begin : begin + _ROWS_PER_STEP].float()
        change = dequantize(_narrow(packed, begin, len(rows))) - rows
        squares += torch.stack([part.double().square().sum() for part in (change, rows)])
    change_squares, weight_squares = squares.tolist()
    return math.sqrt(change_squares / weight_squares) if weight_squares else 0.0


def _choose_grid(groups: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """fp16 scales and whole zero points of groups (N, K/g, g)."""
    if not format.symmetric:
        low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
        scales = _round_away((high - low) / (2**format.bits - 1))
        return scales, torch.round(-low / scales.float().masked_fill(scales == 0, 1.0))
    middle = default_zero(format.bits)
    if format.bits == 8:
        scales = groups.abs().amax(-1) / 127
    else:
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        scales = extreme / -8
    scales = _round_away(scales)
    return scales, torch.full_like(scales, middle, dtype=torch.float32)


def _round_away(scales: Tensor) -> Tensor:
    """To fp16 away from zero: a grid may grow by the rounding of its scale, never shrink.

    So a group of tiny values has the smallest fp16 number (6e-8) as scale rather than none.
    """
    rounded = scales.half()
    is_smaller = rounded.float().abs() < scales.abs()
    return (rounded.view(torch.int16) + is_smaller.to(torch.int16)).view(torch.float16)


def _narrow(packed: PackedWeight, begin: int, count: int) -> PackedWeight:
    """Some rows of a matrix; they begin a block."""
    blocks = slice(begin // 16, -(-(begin + count) // 16))
    zeros = None if packed.zeros is None else packed.zeros[blocks]
    return packed._replace(
        qweight=packed.qweight[blocks],
        scales=packed.scales[blocks],
        zeros=zeros,
        out_features=count,
    )
