"""Each token may use another number of experts; its result is what that number gives alone."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.bounds import measure_error, read_bounds
from tests.kernels.drawing import draw, draw_weight
from tests.kernels.instruction_sets import INSTRUCTION_SETS, use_instruction_set
from tests.kernels.test_fused import choose_experts, draw_experts, run_with_gradients
from tramontane.kernels import fused, native, reference

NUM_EXPERTS = 8
COUNTS = torch.tensor([1, 2, 8, 3, 2, 1, 5, 8, 2, 1, 7])


@pytest.fixture(params=["reference", "fused", *INSTRUCTION_SETS])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    if request.param not in INSTRUCTION_SETS:
        yield {"reference": reference, "fused": fused}[request.param]
        return
    with use_instruction_set(request.param), torch.no_grad():
        yield native


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_chooses_for_each_token_as_it_would_alone(
    kernels: ModuleType, dtype: torch.dtype
) -> None:
    x, weight = draw(len(COUNTS), 48).to(dtype), draw(NUM_EXPERTS, 48, seed=1).to(dtype)
    weights, experts, logits = kernels.top_k_router(x, weight, NUM_EXPERTS, COUNTS)
    for count in COUNTS.unique().tolist():
        rows = COUNTS.eq(count)
        alone = kernels.top_k_router(x, weight, count)
        assert torch.equal(weights[rows, :count], alone[0][rows])
        assert torch.equal(experts[rows, :count], alone[1][rows])
        assert torch.equal(logits[rows], alone[2][rows])
        assert not weights[rows, count:].any()
        assert (experts[rows, count:] == -1).all()


def test_router_takes_no_count_beyond_its_slots(kernels: ModuleType) -> None:
    x, weight = draw(2, 16), draw(4, 16, seed=1)
    for counts in ([0, 1], [1, 3], [-1, 2], [1, 2, 2]):
        with pytest.raises(AssertionError):
            kernels.top_k_router(x, weight, 2, torch.tensor(counts))
    assert kernels.top_k_router(x[:0], weight, 2, torch.empty(0, dtype=torch.int64))[0].numel() == 0


def draw_matrices(bits: int) -> list[Any]:
    shapes = [(NUM_EXPERTS, 96, 64), (NUM_EXPERTS, 64, 96), (NUM_EXPERTS, 96, 64)]
    if bits:
        return [draw_weight(*shape, bits=bits, seed=i) for i, shape in enumerate(shapes)]
    return [draw(*shape, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("bits", [0, 4, 8])
def test_experts_leave_out_the_slots_without_an_expert(kernels: ModuleType, bits: int) -> None:
    x, matrices = draw(len(COUNTS), 64), draw_matrices(bits)
    weights, experts, _ = reference.top_k_router(x, draw(NUM_EXPERTS, 64, seed=1), 8, COUNTS)
    name = "quantized_experts" if bits else "moe_experts"
    run = getattr(kernels, name)
    mixed = run(x, weights, experts, *matrices)
    for t, count in enumerate(COUNTS.tolist()):
        row = slice(t, t + 1)
        alone = run(x[row], weights[row, :count], experts[row, :count], *matrices)
        if kernels is native:
            assert torch.equal(mixed[row], alone)
        assert measure_error(mixed[row], alone) <= read_bounds(name).fp32_values


@pytest.mark.parametrize("bits", [0, 8])
def test_a_token_without_any_expert_gets_nothing(kernels: ModuleType, bits: int) -> None:
    """As a router with a capacity may leave it; another token's infinity is not its own."""
    run = kernels.quantized_experts if bits else kernels.moe_experts
    x = draw(3, 64)
    x[2] = float("inf")
    experts = torch.tensor([[-1, -1], [-1, 3], [3, -1]])
    y = run(x, torch.full((3, 2), 0.5), experts, *draw_matrices(bits))
    assert not y[0].any()
    assert y[1].isfinite().all()
    assert y[1].any()
    assert not y[2].isfinite().all()
    nobody = torch.full((2, 3), -1)
    assert not run(x[:2], torch.zeros(2, 3), nobody, *draw_matrices(bits)).any()


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("expert", [-2, NUM_EXPERTS, 2**40])
def test_there_is_no_such_expert(kernels: ModuleType, bits: int, expert: int) -> None:
    run = kernels.quantized_experts if bits else kernels.moe_experts
    experts = torch.tensor([[0, -1], [1, expert]])
    with pytest.raises(IndexError, match="no such expert"):
        run(draw(2, 64), torch.ones(2, 2), experts, *draw_matrices(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_skipped_slots(dtype: torch.dtype) -> None:
    """As a router with a capacity trains: nothing flows through a slot without an expert."""
    experts = choose_experts(70, num_chosen=3)
    experts[:40, 2], experts[30:50, 1], experts[7] = -1, -1, -1
    inputs = draw_experts(experts)
    rounded = [x.to(dtype) if i not in (1, 2) else x for i, x in enumerate(inputs)]
    exact = [x if i == 2 else x.float() for i, x in enumerate(rounded)]
    actual, gradients = run_with_gradients(fused.moe_experts, rounded, {})
    expected, wanted = run_with_gradients(reference.moe_experts, exact, {})
    bounds = read_bounds("moe_experts")
    value_bound, bound = bounds[:2] if dtype == torch.float32 else bounds[2:]
    assert measure_error(actual, expected) <= value_bound
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert measure_error(ours, theirs) <= bound
    assert not gradients[1][experts == -1].any()


def test_a_router_that_learns_may_have_counts() -> None:
    x, weight = draw(len(COUNTS), 16), draw(NUM_EXPERTS, 16, seed=1)

    def sum_weights(gate: Tensor, kernels: ModuleType) -> Tensor:
        weights, _, _ = kernels.top_k_router(x, gate, NUM_EXPERTS, COUNTS)
        return (weights * torch.arange(NUM_EXPERTS)).sum()

    gradients = [
        torch.autograd.functional.jacobian(lambda gate, k=k: sum_weights(gate, k), weight)
        for k in (reference, fused, native)
    ]
    assert gradients[0].any()
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
