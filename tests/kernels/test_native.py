"""The native kernels equal `reference`, on every instruction set that this machine runs."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.bounds import measure_error, read_bounds
from tests.kernels.drawing import draw, draw_routing, draw_weight
from tests.kernels.instruction_sets import INSTRUCTION_SETS, use_instruction_set
from tramontane.errors import ConfigError
from tramontane.kernels import fused, native, reference
from tramontane.kernels.packing import dequantize

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_instruction_set(request.param):
        yield


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def assert_close(name: str, actual: Tensor, expected: Tensor, scale: float | None = None) -> None:
    bounds = read_bounds(name)
    bound = bounds.fp32_values if actual.dtype == torch.float32 else bounds.bf16_values
    assert actual.dtype in DTYPES
    assert measure_error(actual, expected, scale) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 4, 7, 9, 70])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (16, 32), (100, 129), (97, 256), (30, 2100)])
def test_linear(num_tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = draw(num_tokens, shape[1]).to(dtype), draw(*shape, seed=1).to(dtype)
    expected = reference.linear(x.float(), weight.float())
    assert_close("linear", native.linear(x, weight), expected)


def test_linear_takes_weights_of_the_other_dtype_and_more_dimensions() -> None:
    x, weight = draw(2, 3, 40), draw(6, 40, seed=1)
    expected = reference.linear(x, weight.bfloat16().float())
    assert_close("linear", native.linear(x, weight.bfloat16()), expected)


def test_unaligned_memory() -> None:
    """Weights that a file holds at any even address, of which no vector is aligned."""
    memory = torch.zeros(64 + 2 * 64 * 33, dtype=torch.uint8)
    x = draw(3, 33)
    for offset in (2, 6, 34):
        weight = memory[offset : offset + 2 * 64 * 33].view(torch.bfloat16).view(64, 33)
        weight.copy_(draw(64, 33, seed=1))
        assert_close("linear", native.linear(x, weight), reference.linear(x, weight.float()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 5, 33])
def test_quantized_linear(num_tokens: int, bits: int, group_size: int, symmetric: bool) -> None:
    for num_rows in (1, 16, 37, 200):
        weight = draw_weight(
            num_rows, 256, bits=bits, group_size=group_size, symmetric=symmetric, seed=num_rows
        )
        x = draw(num_tokens, 256)
        expected = reference.quantized_linear(x, weight)
        assert_close("quantized_linear", native.quantized_linear(x, weight), expected)
        in_bf16 = native.quantized_linear(x.bfloat16(), weight)
        expected = reference.quantized_linear(x.bfloat16().float(), weight)
        assert_close("quantized_linear", in_bf16, expected)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e30])
def test_quantized_linear_of_odd_inputs(value: float) -> None:
    weight = draw_weight(20, 64, bits=8)
    x = torch.full((2, 64), value)
    expected = reference.quantized_linear(x, weight)
    assert_close("quantized_linear", native.quantized_linear(x, weight), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    """Damaged weights end in scores that the engine refuses, not in numbers."""
    x = draw(2, 64)
    x[1, 40] = value
    weights, experts = draw_routing(2, 4, 2)
    plain = [draw(4, 96, 64), draw(4, 64, 96), draw(4, 96, 64)]
    packed = [draw_weight(*w.shape, bits=4) for w in plain]
    for out in (
        native.quantized_linear(x, packed[0].select(0)),
        native.linear(x, plain[0][0]),
        native.moe_experts(x, weights, experts, *plain),
        native.quantized_experts(x, weights, experts, *packed),
        native.rms_norm(x, torch.ones(64), 1e-5),
    ):
        assert out[0].isfinite().all()
        assert not out[1].isfinite().all()


ROUTINGS = {
    "one token": torch.tensor([[3, 1]]),
    "all to one expert": torch.tensor([[2]] * 9),
    "empty experts": torch.tensor([[0, 7], [7, 0], [7, 0]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
    "all experts": torch.arange(8).repeat(5, 1),
    "many": torch.randint(0, 8, (700, 1), generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("sizes", [(40, 100), (33, 1), (96, 64)])
def test_moe_experts(sizes: tuple[int, int], routing: str, dtype: torch.dtype) -> None:
    (dim, hidden_dim), experts = sizes, ROUTINGS[routing]
    x = draw(len(experts), dim).to(dtype)
    weights = torch.rand(experts.shape, generator=torch.Generator().manual_seed(1))
    matrices = [
        draw(8, hidden_dim, dim),
        draw(8, dim, hidden_dim),
        draw(8, hidden_dim, dim, seed=3),
    ]
    rounded = [m.to(dtype) for m in matrices]
    expected = reference.moe_experts(x.float(), weights, experts, *(m.float() for m in rounded))
    assert_close("moe_experts", native.moe_experts(x, weights, experts, *rounded), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("first", [0, 1, 37])  # number of the memory: no vector is aligned
def test_experts_that_lie_apart(first: int, routing: str, dtype: torch.dtype) -> None:
    """As w1 w2 w3 w1 w2 w3 ... of a file, read in place: the bits of contiguous stacks."""
    experts = ROUTINGS[routing]
    x = draw(len(experts), 33).to(dtype)
    weights = torch.rand(experts.shape, generator=torch.Generator().manual_seed(1))
    size, count = 96 * 33, 8
    memory = torch.full((first + 4 * count * size,), float("nan"), dtype=dtype)
    stacks = memory[first:].view(count, 4, size)  # what lies between them stays NaN
    shapes = [(96, 33), (33, 96), (96, 33)]
    apart = [stacks[:, i].unflatten(1, shape) for i, shape in enumerate(shapes)]
    together = [draw(count, *shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    for stack, values in zip(apart, together, strict=True):
        stack.copy_(values)
        assert stack.stride(0) == 4 * size
    expected = native.moe_experts(x, weights, experts, *together)
    assert torch.equal(native.moe_experts(x, weights, experts, *apart), expected)


def test_one_expert_for_all() -> None:
    """A stack may repeat one matrix without memory for the others."""
    x, (weights, experts) = draw(9, 16), draw_routing(9, 4, 2)
    matrices = [draw(1, 16, 16, seed=i).expand(4, 16, 16) for i in range(3)]
    expected = native.moe_experts(x, weights, experts, *(m.contiguous() for m in matrices))
    assert torch.equal(native.moe_experts(x, weights, experts, *matrices), expected)


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "-nan", "smallest nan"])
@pytest.mark.parametrize("count", [1, 7, 64, 1000, 2**17 + 5])
def test_what_is_not_finite_is_found(count: int, value: str, dtype: torch.dtype) -> None:
    """At the first and the last place and between, and by torch too."""
    bad = torch.tensor(float(value.removeprefix("smallest ")), dtype=dtype)
    if value == "smallest nan":  # one bit beyond infinity
        bits = torch.tensor(float("inf"), dtype=dtype).view(BITS[dtype.itemsize])
        bad = (bits + 1).view(dtype)
    if value == "-nan":
        bad = -bad
    x = draw(count).to(dtype)
    assert native.is_finite(x)
    for place in {0, count // 3, count - 1}:
        damaged = x.clone()
        damaged[place] = bad
        assert not native.is_finite(damaged)
        assert not reference.is_finite(damaged)


BITS = {2: torch.int16, 4: torch.int32}


@pytest.mark.parametrize("dtype", FLOATS)
def test_all_finite_numbers_are(dtype: torch.dtype) -> None:
    """All of 16 bits; of 32 the largest, the smallest, the subnormal ones, and zeros."""
    if dtype == torch.float32:
        info = torch.finfo(dtype)
        x = torch.tensor([info.max, info.min, info.tiny, -info.tiny, 1e-45, -1e-45, 0.0, -0.0])
    else:
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = x[x.float().isfinite()]
        assert len(x) == 2**16 - 2 * (2**8 if dtype == torch.bfloat16 else 2**11) // 2
    for kernels in (native, fused, reference):
        assert kernels.is_finite(x)
        assert kernels.is_finite(x[:0])


def test_finite_values_of_other_layouts() -> None:
    """Rows that lie apart, at addresses that no vector has; doubles; what lies between is not."""
    x = draw(64, 33)
    x[:, 5] = float("nan")
    assert native.is_finite(x[:, 6:])
    assert not native.is_finite(x[:, 5:])
    assert native.is_finite(x.flatten()[6:38])
    assert native.is_finite(draw(5).double())
    assert not native.is_finite(x.double())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_quantized_experts(routing: str, bits: int) -> None:
    """The hidden values differ in the last bit, and one in a thousand rounds the other way."""
    experts = ROUTINGS[routing]
    x = draw(len(experts), 64)
    weights = torch.rand(experts.shape, generator=torch.Generator().manual_seed(1))
    matrices = [draw_weight(8, *shape, bits=bits, seed=i)
                for i, shape in enumerate([(96, 64), (64, 96), (96, 64)])]  # fmt: skip
    expected = reference.quantized_experts(x, weights, experts, *matrices)
    actual = native.quantized_experts(x, weights, experts, *matrices)
    assert_close("quantized_experts", actual, expected)


@pytest.mark.parametrize("first", [{"bits": 4}, {"bits": 8, "symmetric": False},
                                   {"bits": 8, "group_size": 64}], ids=str)  # fmt: skip
def test_quantized_experts_of_several_formats(first: dict[str, Any]) -> None:
    """As a GGUF may mix them: w1 and w3 read the same rounded inputs, where the groups agree."""
    x, (weights, experts) = draw(9, 64), draw_routing(9, 8, 2)
    matrices = [draw_weight(8, 64, 64, seed=i, **kind)
                for i, kind in enumerate([first, {"bits": 8}, {"bits": 8}])]  # fmt: skip
    expected = reference.quantized_experts(x, weights, experts, *matrices)
    actual = native.quantized_experts(x, weights, experts, *matrices)
    assert_close("quantized_experts", actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [1, 4, 8, 13])
def test_top_k_router(num_experts: int, dtype: torch.dtype) -> None:
    x, weight = draw(50, 48).to(dtype), draw(num_experts, 48, seed=1).to(dtype)
    for num_slots in range(1, num_experts + 1):
        weights, experts, logits = native.top_k_router(x, weight, num_slots)
        assert_close("linear", logits.to(dtype), (x.float() @ weight.float().t()).to(dtype))
        expected, chosen = reference.top_k_routing(logits, num_slots)
        assert torch.equal(experts, chosen)
        assert measure_error(weights, expected) <= 1e-6


def test_equal_logits_choose_the_lower_expert() -> None:
    _, experts, _ = native.top_k_router(torch.ones(3, 4), torch.ones(6, 4), 4)
    assert experts.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 65), (0, 8), (3, 2, 33), (129, 1)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = draw(*shape).to(dtype), (1 + 0.1 * draw(shape[-1], seed=1)).to(dtype)
    expected = reference.rms_norm(x.float(), weight.float(), 1e-5)
    assert_close("rms_norm", native.rms_norm(x, weight, 1e-5), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 6), (33, 4, 64), (0, 2, 8)])
def test_rotate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    angles = 100 * draw(shape[0], shape[2] // 2, seed=1)
    x = draw(*shape).to(dtype)
    expected = reference.rotate(x.float(), angles.cos(), angles.sin())
    assert_close("rotate", native.rotate(x, angles.cos(), angles.sin()), expected)


def test_rotate_reads_a_part_of_each_row() -> None:
    rows = draw(5, 3 * 16)
    x = rows[:, 16:].unflatten(1, (2, 16))
    angles = draw(5, 8, seed=1)
    expected = reference.rotate(x, angles.cos(), angles.sin())
    assert_close("rotate", native.rotate(x, angles.cos(), angles.sin()), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3, 16, 64, 1000])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(1, 1), (1, 9), (7, 7), (5, 12), (1, 130), (33, 33), (20, 300)]
)
def test_causal_attention(
    num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype
) -> None:
    for heads, head_dim in (((4, 2), 16), ((1, 1), 2), ((6, 3), 10), ((8, 1), 64), ((2, 2), 80)):
        q = draw(num_queries, heads[0], head_dim).to(dtype)
        cache = draw(2, heads[1], num_keys + 3, head_dim, seed=1).to(dtype)
        k, v = cache[0, :, :num_keys], cache[1, :, :num_keys]  # heads lie farther apart
        expected = reference.causal_attention(q.float(), k.float(), v.float(), window=window)
        actual = native.causal_attention(q, k, v, window=window)
        assert_close("causal_attention", actual, expected)


def test_causal_attention_of_large_scores() -> None:
    q, k, v = 40 * draw(6, 2, 16), 40 * draw(2, 6, 16, seed=1), draw(2, 6, 16, seed=2)
    expected = reference.causal_attention(q, k, v)
    assert_close("causal_attention", native.causal_attention(q, k, v), expected)


@pytest.mark.parametrize("seqlens", [(), (5,), (3, 1, 40), (16, 16)])
def test_packed_attention(seqlens: Sequence[int]) -> None:
    total = sum(seqlens)
    q, k, v = draw(total, 4, 16), draw(2, total, 16, seed=1), draw(2, total, 16, seed=2)
    if not seqlens:
        assert native.packed_attention(q, k, v, seqlens).shape == q.shape
        return
    expected = reference.packed_attention(q, k, v, seqlens, window=7)
    assert_close("packed_attention", native.packed_attention(q, k, v, seqlens, window=7), expected)


def test_a_router_that_learns_gets_its_gradient() -> None:
    x, (weights, experts) = draw(5, 16), draw_routing(5, 4, 2)
    matrices = [draw(4, 16, 16, seed=i) for i in range(3)]
    with torch.enable_grad():
        weights.requires_grad_()
        native.moe_experts(x, weights, experts, *matrices).sum().backward()
    assert weights.grad is not None


def test_what_does_not_fit_together_is_refused_by_torch() -> None:
    weights, experts = draw_routing(3, 4, 2)
    cube = draw(4, 8, 8)
    for run in (
        lambda: native.linear(draw(3, 8), draw(4, 9)),
        lambda: native.moe_experts(draw(3, 8), weights, experts, draw(4, 8, 9), cube, cube),
        lambda: native.causal_attention(draw(2, 2, 8), draw(1, 4, 6), draw(1, 4, 6)),
        lambda: native.packed_attention(draw(5, 2, 8), draw(1, 5, 8), draw(1, 5, 8), [2, 2]),
        lambda: native.rotate(draw(3, 2, 8), draw(3, 3), draw(3, 3)),
        lambda: native.top_k_router(draw(3, 8), draw(4, 9), 2),
    ):
        with pytest.raises((RuntimeError, AssertionError)):
            run()


def test_a_quantised_weight_that_was_cast_is_refused() -> None:
    weight = draw_weight(16, 32, bits=8)
    with pytest.raises(ConfigError, match="may not be cast or moved"):
        native.quantized_linear(draw(1, 32), weight._replace(scales=weight.scales.float()))


def test_what_is_not_for_them_goes_to_fused() -> None:
    x, weight = draw(3, 8).double(), draw(4, 8).double()
    assert torch.equal(native.linear(x, weight), fused.linear(x, weight))
    with torch.enable_grad():
        leaf = draw(3, 8).requires_grad_()
        native.linear(leaf, draw(4, 8)).sum().backward()
    assert leaf.grad is not None


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    num_rows=st.integers(1, 200),
    num_groups=st.integers(1, 5),
    num_threads=st.integers(1, 3),
)
def test_linear_of_any_size(
    num_tokens: int, num_rows: int, num_groups: int, num_threads: int
) -> None:
    """Errors are measured against what such sums come to: a single one may cancel to nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    x = draw(num_tokens, num_groups * 32)
    weight = draw(num_rows, num_groups * 32, seed=1)
    scale = (num_groups * 32) ** 0.5
    assert_close("linear", native.linear(x, weight), reference.linear(x, weight), scale)
    packed = draw_weight(num_rows, num_groups * 32, bits=4)
    expected = reference.quantized_linear(x, packed)
    scale *= dequantize(packed).std().item()
    assert_close("quantized_linear", native.quantized_linear(x, packed), expected, scale)
    torch.set_num_threads(before)
