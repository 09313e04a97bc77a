"""Round-to-nearest: errors within half a step, exact extremes, and groups at the edge of fp16."""

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.quant.test_formats import FORMATS
from tramontane.errors import ConfigError
from tramontane.kernels.packing import dequantize, pack, unpack
from tramontane.quant import fitting, formats
from tramontane.quant.fitting import measure_relative_error, quantize_weight, round_to_nearest
from tramontane.quant.formats import QuantFormat

EACH_FORMAT = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def find_steps(weight: Tensor, format: QuantFormat) -> tuple[Tensor, Tensor]:
    """The change of each value in steps of its group, and the steps."""
    fitted = round_to_nearest(weight, format)
    steps = fitted.scales.float().abs().repeat_interleave(format.group_size, -1)
    values = dequantize(pack(*fitted, bits=format.bits))
    return torch.where(steps > 0, (values - weight).abs() / steps, (values - weight).abs()), steps


@EACH_FORMAT
@settings(max_examples=25)
@given(
    exponent=st.floats(-30, 12),
    offset=st.floats(-3, 3),
    seed=st.integers(0, 1000),
    num_zero=st.integers(0, 128),
)
def test_no_value_is_off_by_more_than_half_a_step(
    format: QuantFormat, exponent: float, offset: float, seed: int, num_zero: int
) -> None:
    """Of 4 symmetric bits: but for a value near the extreme and of the other sign, by one step."""
    weight = (draw(3, 128, seed=seed) + offset) * 2.0**exponent
    weight[:, :num_zero] = 0
    changes, steps = find_steps(weight, format)
    if format.bits == 4 and format.symmetric:
        groups = weight.unflatten(-1, (-1, format.group_size))
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        is_clipped = (groups / extreme < -7.5 / 8).flatten(-2)
        assert (changes[is_clipped] <= 1.001).all()
        changes = changes[~is_clipped]
    assert (changes <= 0.501).all()
    assert steps.isfinite().all()


@EACH_FORMAT
def test_more_bits_and_smaller_groups_are_more_exact(format: QuantFormat) -> None:
    weight = draw(64, 256)
    error = measure_relative_error(weight, quantize_weight(weight, format))
    low, high = {4: (0.06, 0.13), 8: (0.003, 0.008)}[format.bits]
    assert low < error < high
    if format.group_size > 32:
        finer = QuantFormat(format.bits, format.group_size // 2, format.symmetric)
        assert measure_relative_error(weight, quantize_weight(weight, finer)) < error


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_formats_are_as_exact_as_those_of_gguf(bits: int) -> None:
    """Q4_0 and Q8_0 are the same grids; only the rounding of the scale to fp16 differs."""
    weight = draw(32, 128)
    kind = gguf.GGMLQuantizationType[{4: "Q4_0", 8: "Q8_0"}[bits]]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    ours = quantize_weight(weight, QuantFormat(bits))
    their_error = (torch.from_numpy(theirs) - weight).norm() / weight.norm()
    assert measure_relative_error(weight, ours) == pytest.approx(their_error.item(), rel=0.01)
    # What was rounded once stays as it is.
    again = dequantize(quantize_weight(torch.from_numpy(theirs), QuantFormat(bits)))
    assert torch.equal(again, torch.from_numpy(theirs))


@EACH_FORMAT
def test_groups_of_zeros_stay_zero(format: QuantFormat) -> None:
    weight = draw(5, 256)
    weight[2, :128] = 0
    weight[3] = -0.0
    packed = quantize_weight(weight, format)
    values = dequantize(packed)
    assert not values[2, :128].any()
    assert not values[3].any()
    assert values[2, 128:].any()
    middle = unpack(packed)[3]
    assert (middle == (1 << (format.bits - 1) if format.symmetric else 0)).all()


@EACH_FORMAT
def test_an_asymmetric_group_may_have_one_sign(format: QuantFormat) -> None:
    for sign in (1, -1):
        weight = sign * (draw(4, 128).abs() + 5)
        changes, _ = find_steps(weight, format)
        assert (changes <= 0.501).all()


@pytest.mark.parametrize("size", [1e-8, 6e-8, 1e-7, 1e-6, 1e-5, 6.1e-5])
@EACH_FORMAT
def test_scales_below_fp16_are_rounded_up_and_not_to_nothing(
    format: QuantFormat, size: float
) -> None:
    weight = draw(3, 128) * size
    changes, steps = find_steps(weight, format)
    assert (steps >= 2**-24).all()
    assert (changes <= 1.001).all()


@EACH_FORMAT
def test_values_beyond_the_scales_are_refused(format: QuantFormat) -> None:
    for value in (1e9, float("inf"), -float("inf"), float("nan")):
        weight = draw(40, 128)
        weight[33, 5] = value
        with pytest.raises(ConfigError, match=rf"not finite or too large .* {format.name}"):
            quantize_weight(weight, format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@EACH_FORMAT
def test_a_matrix_in_steps_equals_one_at_once(
    format: QuantFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(75, 128).to(dtype)
    whole = quantize_weight(weight, format)
    monkeypatch.setattr(formats, "_VALUES_PER_STEP", 128 * 32)
    monkeypatch.setattr(fitting, "_ROWS_PER_STEP", 16)
    parts = quantize_weight(weight, format)
    assert torch.equal(dequantize(parts), dequantize(whole))
    assert torch.equal(parts.qweight, whole.qweight)
    change = dequantize(whole) - weight.float()
    expected = (change.double().norm() / weight.double().norm()).item()
    assert measure_relative_error(weight, parts) == pytest.approx(expected, rel=1e-6)


def test_a_transposed_view_is_as_good_as_a_copy() -> None:
    weight = draw(128, 37).t()
    packed = quantize_weight(weight, QuantFormat(4))
    assert torch.equal(packed.qweight, quantize_weight(weight.contiguous(), QuantFormat(4)).qweight)


def test_the_error_of_a_matrix_of_zeros_is_none() -> None:
    weight = torch.zeros(3, 32)
    assert measure_relative_error(weight, quantize_weight(weight, QuantFormat(4))) == 0.0
