"""Attention over blocks of a pool equals attention over the same keys in one piece."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.bounds import measure_error, read_bounds
from tests.kernels.drawing import draw
from tests.kernels.instruction_sets import INSTRUCTION_SETS, use_instruction_set
from tramontane.kernels import fused, native, reference

NOWHERE = 2**40  # a block that would crash whoever reads it


@pytest.fixture(params=["reference", "fused", *INSTRUCTION_SETS])
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    if request.param not in INSTRUCTION_SETS:
        yield {"reference": reference, "fused": fused}[request.param]
        return
    with use_instruction_set(request.param), torch.no_grad():
        yield native


class Case(NamedTuple):
    """Sequences (queries, keys), and where their keys are: in one piece, and in blocks."""

    queries: list[Tensor]  # (T, H, S) each
    pairs: list[tuple[Tensor, Tensor]]  # (G, M, S) each
    key_pool: Tensor
    value_pool: Tensor
    tables: Tensor

    def attend(self, kernels: ModuleType, window: int | None) -> Tensor:
        """What the paged kernel gives for all of them."""
        return kernels.paged_attention(
            torch.cat(self.queries), self.key_pool, self.value_pool, self.tables,
            torch.tensor([len(q) for q in self.queries]),
            torch.tensor([k.shape[1] for k, _ in self.pairs]), window=window,
        )  # fmt: skip


def make_case(
    sizes: list[tuple[int, int]], *, block_size: int = 16, heads: tuple[int, int] = (4, 2),
    head_dim: int = 16, window: int | None = None, dtype: torch.dtype = torch.float32,
) -> Case:  # fmt: skip
    """Shuffled blocks; what is behind the window is nowhere, what is not used yet is NaN."""
    width = max(-(-num_keys // block_size) for _, num_keys in sizes) + 1
    order = torch.randperm(len(sizes) * width, generator=torch.Generator().manual_seed(0))
    tables = order.view(len(sizes), width).clone()
    shape = (len(order), heads[1], block_size, head_dim)
    pools = [torch.full(shape, float("nan"), dtype=dtype) for _ in "kv"]
    queries, pairs = [], []
    for i, (num_queries, num_keys) in enumerate(sizes):
        queries.append(draw(num_queries, heads[0], head_dim, seed=3 * i).to(dtype))
        k, v = (draw(heads[1], num_keys, head_dim, seed=3 * i + j).to(dtype) for j in (1, 2))
        pairs.append((k, v))
        positions = torch.arange(num_keys)
        slots = tables[i, positions // block_size] * block_size + positions % block_size
        reference.store_paged(k.transpose(0, 1), v.transpose(0, 1), *pools, slots)
        if window is not None:
            num_free = max(0, num_keys - num_queries + 1 - window) // block_size
            for pool in pools:
                pool[tables[i, :num_free]] = float("nan")
            tables[i, :num_free] = NOWHERE
    return Case(queries, pairs, *pools, tables)


def check(kernels: ModuleType, case: Case, window: int | None) -> None:
    actual = case.attend(kernels, window)
    parts = list(zip(case.queries, case.pairs, strict=True))
    if kernels is native:
        alone = [native.causal_attention(q, *pair, window=window) for q, pair in parts]
        assert torch.equal(actual, torch.cat(alone))
    dtype = actual.dtype if kernels is reference else torch.float32
    expected = torch.cat([
        reference.causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), window=window)
        for q, (k, v) in parts
    ])  # fmt: skip
    bounds = read_bounds("paged_attention")
    bound = bounds.fp32_values if actual.dtype == torch.float32 else bounds.bf16_values
    assert measure_error(actual, expected) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 16, 20, 33, 1000])
@pytest.mark.parametrize(
    "sizes",
    [[(1, 1)], [(1, 50)], [(16, 16), (1, 17)], [(3, 40), (1, 33), (70, 70), (1, 1), (5, 100)],
     [(0, 7), (2, 9)]],
    ids=str,
)  # fmt: skip
def test_shuffled_blocks(
    kernels: ModuleType, sizes: list[tuple[int, int]], window: int | None, dtype: torch.dtype
) -> None:
    check(kernels, make_case(sizes, window=window, dtype=dtype), window)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 3), (8, 1)])
@pytest.mark.parametrize("head_dim", [2, 10, 64, 80])
def test_any_heads(kernels: ModuleType, heads: tuple[int, int], head_dim: int) -> None:
    check(kernels, make_case([(4, 40), (1, 20)], heads=heads, head_dim=head_dim), None)


@pytest.mark.parametrize("block_size", [1, 5, 32, 64])
@pytest.mark.parametrize("window", [None, 7, 40])
def test_any_size_of_blocks(kernels: ModuleType, block_size: int, window: int | None) -> None:
    case = make_case([(4, 90), (1, 20)], block_size=block_size, window=window)
    if kernels is native and block_size % 16:
        bound = read_bounds("paged_attention").fp32_values  # goes to torch
        expected = case.attend(reference, window)
        assert measure_error(case.attend(native, window), expected) <= bound
    else:
        check(kernels, case, window)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 70)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 90),
    num_threads=st.integers(1, 3),
)
def test_any_sequences(sizes: list[tuple[int, int]], window: int | None, num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    case = make_case([(new, new + old + 1) for new, old in sizes], window=window)
    with torch.no_grad():
        check(native, case, window)
    torch.set_num_threads(before)


def test_sequences_that_do_not_fit_are_refused() -> None:
    case = make_case([(4, 20)])
    for queries, keys in (([3], [20]), ([5], [20]), ([4], [3]), ([4], [49]), ([-4], [20])):
        with pytest.raises(ValueError, match=r"sequence|queries"), torch.no_grad():
            native.paged_attention(
                case.queries[0], case.key_pool, case.value_pool, case.tables,
                torch.tensor(queries), torch.tensor(keys),
            )  # fmt: skip


def test_store_writes_the_slots_and_nothing_else(kernels: ModuleType) -> None:
    key_pool, value_pool = torch.zeros(2, 5, 2, 16, 8).unbind()
    k, v = draw(4, 2, 8), draw(4, 2, 8, seed=1)
    kernels.store_paged(k, v, key_pool, value_pool, torch.tensor([79, 0, 17, 16]))
    for pool, new in ((key_pool, k), (value_pool, v)):
        for t, (block, place) in enumerate([(4, 15), (0, 0), (1, 1), (1, 0)]):
            assert torch.equal(pool[block, :, place], new[t])
        assert pool.count_nonzero() == new.numel()
