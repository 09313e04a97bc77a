"""The table of bounds of docs/numerics.md, and the measure of error that it defines."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

_TABLE = Path(__file__).parents[1] / "docs" / "numerics.md"
_SMALLEST_SCALE = 1e-6


class Bounds(NamedTuple):
    """Largest errors of a kernel, by `measure_error`."""

    fp32_values: float
    fp32_gradients: float
    bf16_values: float
    bf16_gradients: float


def read_bounds(kernel: str) -> Bounds:
    """The row of the table that starts with the kernel's name."""
    rows = [line.strip("|").split("|") for line in _TABLE.read_text().splitlines()]
    (row,) = [row for row in rows if row[0].strip() == kernel]
    return Bounds(*(float(cell) for cell in row[1:]))


def measure_error(actual: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Largest difference, relative to `scale` (None: the largest expected value).

    Infinite if a value is NaN.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    if scale is None:
        scale = max(expected.abs().max().item(), _SMALLEST_SCALE)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    return error if error == error else float("inf")
