"""The specification of products with packed weights, against loops over single values."""

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bounds import measure_error, read_bounds
from tests.kernels.test_packing import draw
from tests.oracles.quantized import read_values, round_activations
from tramontane.kernels import fused, reference
from tramontane.kernels.packing import PackedWeight, pack
from tramontane.kernels.reference import quantize_rows

BACKENDS = pytest.mark.parametrize("kernels", [reference, fused])
FORMATS = pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(4, 32, True), (4, 64, False), (8, 32, True), (8, 128, False)],
)


def draw_rows(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_weight(*shape: int, bits: int, group_size: int, symmetric: bool) -> PackedWeight:
    """Values of order one in magnitude / sqrt(K)."""
    q, scales, zeros = draw(shape, bits=bits, group_size=group_size, symmetric=symmetric)
    scales = scales / (2.0**bits * shape[-1] ** 0.5)
    return pack(q, scales.half(), zeros, bits=bits)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_rows_are_rounded_to_the_nearest_of_255_steps(group_size: int) -> None:
    x = draw_rows(7, 256)
    q, scales = quantize_rows(x, group_size=group_size)
    assert (q.dtype, scales.dtype, scales.shape) == (
        torch.int8, torch.float32, (7, 256 // group_size),
    )  # fmt: skip
    rounded = q.float() * scales.repeat_interleave(group_size, -1)
    assert torch.equal(rounded, round_activations(x, group_size))
    assert ((rounded - x).abs() <= scales.repeat_interleave(group_size, -1) * 0.5001).all()
    assert (q.unflatten(-1, (-1, group_size)).abs().amax(-1) == 127).all()


def test_halves_are_rounded_to_even_and_zeros_stay() -> None:
    x = torch.zeros(2, 32)
    x[0, :5] = torch.tensor([127.0, 0.5, 1.5, -2.5, -3.5])
    q, scales = quantize_rows(x, group_size=32)
    assert scales.tolist() == [[1.0], [0.0]]
    assert q[0, :5].tolist() == [127, 0, 2, -2, -4]
    assert not q[0, 5:].any()
    assert not q[1].any()


def test_tiny_and_huge_rows() -> None:
    for size in (1e-45, 2.7e-43, 1e-38, 1e38):
        q, scales = quantize_rows(torch.full((1, 32), size), group_size=32)
        assert q.min() >= 0  # no quotient runs over
        assert scales.isfinite().all()


@BACKENDS
@FORMATS
@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_linear(
    kernels: ModuleType, bits: int, group_size: int, symmetric: bool, num_tokens: int
) -> None:
    weight = draw_weight(37, 256, bits=bits, group_size=group_size, symmetric=symmetric)
    x = draw_rows(num_tokens, 256)
    expected = round_activations(x, group_size) @ torch.from_numpy(read_values(weight)).t()
    y = kernels.quantized_linear(x, weight)
    assert (y.dtype, y.shape) == (torch.float32, (num_tokens, 37))
    assert measure_error(y, expected) <= read_bounds("quantized_linear").fp32_values
    low = kernels.quantized_linear(x.bfloat16(), weight)
    expected = kernels.quantized_linear(x.bfloat16().float(), weight).bfloat16()
    assert torch.equal(low, expected)


@BACKENDS
@FORMATS
def test_experts(kernels: ModuleType, bits: int, group_size: int, symmetric: bool) -> None:
    dim, hidden_dim, num_experts = 128, 256, 5
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    w1 = draw_weight(num_experts, hidden_dim, dim, **options)
    w2 = draw_weight(num_experts, dim, hidden_dim, **options)
    w3 = w1._replace(scales=-w1.scales * 2)
    x, weights = draw_rows(9, dim), torch.softmax(draw_rows(9, 2), -1)
    experts = draw_rows(9, num_experts, seed=2).argsort(-1)[:, :2]
    expected = torch.zeros_like(x)
    for slot in range(2):
        for token, expert in enumerate(experts[:, slot].tolist()):
            row = x[token : token + 1]
            hidden = F.silu(kernels.quantized_linear(row, w1.select(expert)))
            hidden = hidden * kernels.quantized_linear(row, w3.select(expert))
            out = kernels.quantized_linear(hidden, w2.select(expert))[0]
            expected[token] += weights[token, slot] * out
    y = kernels.quantized_experts(x, weights, experts, w1, w2, w3)
    assert measure_error(y, expected) <= read_bounds("quantized_experts").fp32_values
    low = kernels.quantized_experts(x.bfloat16(), weights, experts, w1, w2, w3)
    exact = kernels.quantized_experts(x.bfloat16().float(), weights, experts, w1, w2, w3)
    assert torch.equal(low, exact.bfloat16())


@BACKENDS
def test_experts_without_tokens_and_tokens_without_order(kernels: ModuleType) -> None:
    """The order of the tokens changes no bit, and nothing comes of nothing."""
    options = {"bits": 4, "group_size": 32, "symmetric": True}
    w1, w2 = draw_weight(4, 64, 32, **options), draw_weight(4, 32, 64, **options)
    x, weights, experts = draw_rows(6, 32), torch.ones(6, 1), torch.tensor([[0, 3, 3, 0, 3, 0]]).t()
    y = kernels.quantized_experts(x, weights, experts, w1, w2, w1)
    assert y.abs().amin(-1).max() > 0
    back = kernels.quantized_experts(x.flip(0), weights, experts.flip(0), w1, w2, w1).flip(0)
    assert measure_error(back, y) <= read_bounds("quantized_experts").fp32_values
    empty = kernels.quantized_experts(x[:0], weights[:0], experts[:0], w1, w2, w1)
    assert empty.shape == (0, 32)
