"""A row's bits are the same whatever rows come with it, on any number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.drawing import draw, draw_routing, draw_weight
from tests.kernels.instruction_sets import INSTRUCTION_SETS, use_instruction_set
from tramontane.kernels import native

BATCHES = [*range(1, 65), 512]  # two threads, where a batch is work enough for them


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_instruction_set(request.param), torch.no_grad():
        yield


@pytest.fixture(params=[1, 2, 3])
def _num_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def assert_rows_stand_alone(run: Callable[[slice], Tensor], num_rows: int = 512) -> None:
    """`run(rows)` gives the outputs of these rows alone: the same bits as among all of them."""
    alone = torch.cat([run(slice(i, i + 1)) for i in range(num_rows)])
    for size in BATCHES:
        for start in {0, (num_rows - size) // 2, num_rows - size}:
            rows = slice(start, start + size)
            assert torch.equal(run(rows), alone[rows]), (size, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(dtype: torch.dtype) -> None:
    x, weight = draw(512, 72).to(dtype), draw(53, 72, seed=1).to(dtype)
    assert_rows_stand_alone(lambda rows: native.linear(x[rows], weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 37, 96])
def test_swiglu(size: int, dtype: torch.dtype) -> None:
    gate, up = draw(512, size).to(dtype), draw(512, size, seed=1).to(dtype)
    assert_rows_stand_alone(lambda rows: native.swiglu(gate[rows], up[rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_summed_in_parts(dtype: torch.dtype) -> None:
    x, weight = draw(140, 2100).to(dtype), draw(30, 2100, seed=1).to(dtype)
    alone = torch.cat([native.linear(row[None], weight) for row in x])
    for size in (2, 8, 13, 130, 140):
        assert torch.equal(native.linear(x[:size], weight), alone[:size])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_linear(bits: int) -> None:
    x, weight = draw(512, 64), draw_weight(53, 64, bits=bits, symmetric=False)
    assert_rows_stand_alone(lambda rows: native.quantized_linear(x[rows], weight))


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_experts(bits: int) -> None:
    """Random groupings: any rows, with their own routing."""
    x, (weights, experts) = draw(512, 64).bfloat16(), draw_routing(512, 8, 2)
    shapes = [(8, 96, 64), (8, 64, 96), (8, 96, 64)]
    if bits == 0:
        plain = [draw(*shape).bfloat16() for shape in shapes]
        assert_rows_stand_alone(
            lambda rows: native.moe_experts(x[rows], weights[rows], experts[rows], *plain)
        )
        return
    packed = [draw_weight(*shape, bits=bits) for shape in shapes]
    assert_rows_stand_alone(
        lambda rows: native.quantized_experts(x[rows], weights[rows], experts[rows], *packed)
    )


def test_experts_of_a_shuffled_batch() -> None:
    x, (weights, experts) = draw(300, 64).bfloat16(), draw_routing(300, 8, 2)
    plain = [draw(8, *shape).bfloat16() for shape in ((96, 64), (64, 96), (96, 64))]
    expected = native.moe_experts(x, weights, experts, *plain)
    for seed in range(10):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        actual = native.moe_experts(x[order], weights[order], experts[order], *plain)
        assert torch.equal(actual, expected[order])


@pytest.mark.parametrize(("window", "size"), [(None, 32), (20, 32), (None, 10)])
def test_attention_in_chunks(window: int | None, size: int) -> None:
    """A query reads the same, however many queries come with it."""
    q, k, v = draw(150, 4, size), draw(2, 150, size, seed=1), draw(2, 150, size, seed=2)
    whole = native.causal_attention(q, k, v, window=window)
    for chunk in range(1, 65):
        for start in range(0, 150, chunk):
            end = min(150, start + chunk)
            part = native.causal_attention(q[start:end], k[:, :end], v[:, :end], window=window)
            assert torch.equal(part, whole[start:end]), (chunk, start)


@pytest.mark.usefixtures("_num_threads")
def test_any_number_of_threads() -> None:
    x, (weights, experts) = draw(600, 256).bfloat16(), draw_routing(600, 8, 2)
    plain = [draw(8, *shape).bfloat16() for shape in ((64, 256), (256, 64), (64, 256))]
    packed = [draw_weight(*w.shape, bits=4) for w in plain]
    q, k, v = draw(40, 8, 64), draw(2, 40, 64, seed=1), draw(2, 40, 64, seed=2)
    angles = draw(600, 16)

    def run() -> list[Tensor]:
        return [
            native.linear(x, plain[0][0]), native.rms_norm(x, x[0], 1e-5),
            native.moe_experts(x, weights, experts, *plain),
            native.quantized_linear(x, packed[0].select(0)),
            native.quantized_experts(x, weights, experts, *packed),
            native.rotate(x.view(600, 8, 32), angles.cos(), angles.sin()),
            native.causal_attention(q, k, v), native.swiglu(x, x.flip(0)),
            *native.top_k_router(x, x[:8], 2),
        ]  # fmt: skip

    actual = run()
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(actual, run(), strict=True))
