"""Drawing tokens: the specification against transformers, the native kernel against both."""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.kernels.instruction_sets import INSTRUCTION_SETS, use_instruction_set
from tramontane.kernels import fused, native, reference
from tramontane.kernels.sampling import filter_logits, keep_min_p, keep_top_k, keep_top_p

VOCAB = 97
BOUNDARY = 1e-6  # as close to a boundary between two tokens, rounding may decide
SMALL_CHANCE = 4e-6  # of a token that need not be found


class Settings(NamedTuple):
    """Those of one row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


WAYS = [
    Settings(), Settings(0.7), Settings(100.0), Settings(0.02), Settings(1e-5), Settings(0.0),
    Settings(top_k=1), Settings(top_k=2), Settings(0.8, top_k=7), Settings(1.3, top_k=50),
    Settings(top_k=400), Settings(top_k=10**6), Settings(top_k=-1),
    Settings(top_p=1e-30), Settings(top_p=0.1), Settings(top_p=0.5), Settings(0.8, top_p=0.95),
    Settings(1.5, top_p=0.999), Settings(top_p=0.999999), Settings(min_p=1.0),
    Settings(min_p=0.05), Settings(2.0, min_p=0.001), Settings(top_k=40, top_p=0.9),
    Settings(top_k=200, top_p=0.3), Settings(0.7, 40, 0.9, 0.02), Settings(1.5, 300, 0.99, 0.3),
]  # fmt: skip


@pytest.fixture(params=INSTRUCTION_SETS)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_instruction_set(request.param):
        yield


def draw_logits(num_rows: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def draw_numbers(count: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample(kernels: ModuleType, logits: Tensor, ways: list[Settings], numbers: Tensor) -> Tensor:
    temperature, top_k, top_p, min_p = zip(*ways, strict=True)
    return kernels.sample_tokens(
        logits, torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p),
        torch.tensor(min_p), numbers,
    )  # fmt: skip


def compute_chances(logits: Tensor, way: Settings) -> Tensor:
    """Those of one row (V,), by the specification; the settings as fp32 has them."""
    temperature, top_p, min_p = torch.tensor([way.temperature, way.top_p, way.min_p]).tolist()
    kept = filter_logits(logits, temperature=temperature, top_k=way.top_k, top_p=top_p, min_p=min_p)
    return torch.softmax(kept, dim=0)


def assert_same_draws(logits: Tensor, ways: list[Settings], numbers: Tensor) -> None:
    """The same tokens, save where a number lies on the boundary between two of them."""
    actual = sample(native, logits, ways, numbers)
    expected = sample(reference, logits, ways, numbers)
    for r in (actual != expected).nonzero().flatten().tolist():
        sums = compute_chances(logits[r], ways[r]).double().cumsum(0)
        assert (sums / sums[-1] - numbers[r]).abs().min() <= BOUNDARY, (ways[r], numbers[r])


def assert_keeps_the_same(logits: Tensor, way: Settings) -> None:
    """A number in the middle of a token's share of the chances draws that token."""
    chances = compute_chances(logits, way).double()
    middles = (chances.cumsum(0) - chances / 2) / chances.sum()
    tokens = (chances > SMALL_CHANCE).nonzero().flatten()
    tokens = tokens[:: 1 + len(tokens) // 400]
    rows = logits.expand(len(tokens), -1)
    assert torch.equal(sample(native, rows, [way] * len(tokens), middles[tokens]), tokens)


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("vocab_size", [1, 2, 15, 64, 97, 6144, 6145, 32000])
def test_native_draws_as_the_reference(vocab_size: int) -> None:
    repeats = 2 if vocab_size == 32000 else 8
    ways = WAYS * repeats
    for scale in (0.01, 1.0, 4.0):
        logits = draw_logits(len(ways), vocab_size, seed=vocab_size, scale=scale)
        assert_same_draws(logits, ways, draw_numbers(len(ways), seed=vocab_size))


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("vocab_size", [15, 97, 6145])
def test_native_keeps_the_same_tokens(vocab_size: int) -> None:
    ways = [way for way in WAYS if way.temperature > 0]
    for row, way in zip(draw_logits(len(ways), vocab_size, seed=1), ways, strict=True):
        assert_keeps_the_same(row, way)


@pytest.mark.usefixtures("_instruction_set")
def test_scores_that_a_mask_has_left() -> None:
    """As grammars and lists of allowed tokens leave them: -infinity but for a few."""
    logits = draw_logits(len(WAYS) * 4, 6144, seed=2)
    logits[draw_logits(*logits.shape, seed=3) < 5] = float("-inf")
    assert_same_draws(logits, WAYS * 4, draw_numbers(len(logits)))
    one = torch.full((len(WAYS), 6144), float("-inf"))
    allowed = (torch.arange(len(WAYS)) * 229) % 6144
    one[torch.arange(len(WAYS)), allowed] = draw_logits(1, len(WAYS))[0] * 30
    for number in (0.0, 0.5, 1 - 2**-53):
        numbers = torch.full((len(WAYS),), number, dtype=torch.float64)
        for kernels in (reference, fused, native):
            assert torch.equal(sample(kernels, one, WAYS, numbers), allowed)


@pytest.mark.usefixtures("_instruction_set")
def test_equal_scores() -> None:
    """The k-th's equals are kept; of those that cross top-p's share the lowest ids."""
    flat = torch.zeros(128)
    raised = torch.zeros(128)
    raised[[3, 70, 71]] = 1.0
    for logits in (flat, raised, flat.masked_fill(torch.arange(128) % 3 == 0, float("-inf"))):
        for way in (Settings(), Settings(top_k=2), Settings(top_k=3), Settings(top_k=5),
                    Settings(min_p=1.0), Settings(top_p=1e-30), Settings(top_p=0.03)):  # fmt: skip
            assert_keeps_the_same(logits, way)
    for top_p, num_kept in ((0.5, 64), (0.25, 32), (0.2500001, 33), (1 / 128, 1)):
        numbers = torch.tensor([1 - 2**-53], dtype=torch.float64)
        for kernels in (reference, native):
            last = sample(kernels, flat[None], [Settings(top_p=top_p)], numbers)
            assert last.tolist() == [num_kept - 1]


@pytest.mark.usefixtures("_instruction_set")
def test_scores_of_a_bf16_model() -> None:
    """Many are equal."""
    logits = draw_logits(len(WAYS) * 4, 6144, seed=4).bfloat16().float()
    numbers = draw_numbers(len(logits))
    ways = [way for way in WAYS * 4 if way.top_p == 1]
    assert_same_draws(logits[: len(ways)], ways, numbers[: len(ways)])


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("vocab_size", [1, 40, 6144])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_still_give_an_id(vocab_size: int, value: float) -> None:
    whole = torch.full((len(WAYS), vocab_size), value)
    part = draw_logits(len(WAYS), vocab_size)
    part[:, ::3] = value
    for logits in (whole, part):
        for kernels in (reference, native):
            tokens = sample(kernels, logits, WAYS, draw_numbers(len(WAYS)))
            assert tokens.dtype == torch.int64
            assert ((tokens >= 0) & (tokens < vocab_size)).all()


@pytest.mark.usefixtures("_instruction_set")
@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_first_and_the_last_number(number: float) -> None:
    ways = [way for way in WAYS if way.temperature > 0.1]
    logits = draw_logits(len(ways), 1001, seed=5, scale=1.0)
    tokens = sample(native, logits, ways, torch.full((len(ways),), number, dtype=torch.float64))
    for row, way, token in zip(logits, ways, tokens.tolist(), strict=True):
        chances = compute_chances(row, way)
        assert chances[token] > 0
        outside = chances[:token] if number == 0 else chances[token + 1 :]
        assert outside.sum() <= BOUNDARY


@pytest.mark.usefixtures("_instruction_set")
def test_a_row_does_not_depend_on_its_company() -> None:
    """Nor on threads, nor on whether rows are the first columns of wider ones."""
    ways, before = WAYS * 3, torch.get_num_threads()
    logits, numbers = draw_logits(len(ways), 1003), draw_numbers(len(ways))
    alone = torch.cat([
        sample(native, logits[i : i + 1], ways[i : i + 1], numbers[i : i + 1])
        for i in range(len(ways))
    ])  # fmt: skip
    wide = torch.full((len(ways), 1100), float("inf"))
    wide[:, :1003] = logits
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(sample(native, logits, ways, numbers), alone)
        assert torch.equal(sample(native, wide[:, :1003], ways, numbers), alone)
    torch.set_num_threads(before)


@settings(max_examples=100, deadline=None)
@given(
    vocab_size=st.integers(1, 700),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1000.0]),
    temperature=st.sampled_from([1e-5, 0.1, 1.0, 10.0, 100.0]),
    top_k=st.integers(-1, 800),
    top_p=st.sampled_from([1e-30, 0.2, 0.7, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.5]),
)
def test_native_draws_what_the_filters_keep(
    vocab_size: int, seed: int, scale: float, temperature: float, top_k: int, top_p: float,
    min_p: float,
) -> None:  # fmt: skip
    logits = draw_logits(1, vocab_size, seed=seed, scale=scale)[0]
    way = Settings(temperature, top_k, top_p, min_p)
    if scale > 0 or top_p in (1e-30, 1.0):
        assert_keeps_the_same(logits, way)
    numbers = draw_numbers(20, seed=seed)
    tokens = sample(native, logits.expand(20, -1), [way] * 20, numbers)
    chances = compute_chances(logits, way)
    sums = chances.double().cumsum(0) / chances.double().sum()
    for token, number in zip(tokens, numbers, strict=True):
        assert sums[token] >= number - BOUNDARY - 1 / vocab_size * (scale == 0)
        assert sums[token] - chances[token] <= number + BOUNDARY + 1 / vocab_size * (scale == 0)


def test_what_is_not_for_native_goes_to_torch() -> None:
    logits, numbers = draw_logits(len(WAYS), VOCAB), draw_numbers(len(WAYS))
    expected = sample(reference, logits, WAYS, numbers)
    apart = logits.t().contiguous().t()
    assert torch.equal(sample(native, apart, WAYS, numbers), expected)
    assert torch.equal(sample(fused, logits, WAYS, numbers), expected)
    for kernels in (reference, fused, native):
        nobody = kernels.sample_tokens(
            logits[:0], *torch.empty(4, 0).unbind(), torch.empty(0, dtype=torch.float64)
        )
        assert (nobody.shape, nobody.dtype) == ((0,), torch.int64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("top_k", [1, 2, 10, VOCAB, 1000])
def test_top_k_matches_transformers(top_k: int, seed: int) -> None:
    logits = draw_logits(1, VOCAB, seed=seed)
    expected = TopKLogitsWarper(top_k)(None, logits)[0]
    torch.testing.assert_close(keep_top_k(logits[0], top_k), expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("top_p", [1e-30, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_top_p_matches_transformers(top_p: float, seed: int) -> None:
    logits = draw_logits(1, VOCAB, seed=seed)
    expected = TopPLogitsWarper(top_p)(None, logits)[0]
    torch.testing.assert_close(keep_top_p(logits[0], top_p), expected)


def test_top_p_that_is_reached_exactly_matches_transformers() -> None:
    logits = torch.tensor([[0.0625, 0.5, 0.25, 0.1875]]).log()
    for top_p, num_kept in ((0.5, 1), (0.75, 2), (0.8, 3)):
        kept = keep_top_p(logits[0], top_p).isfinite()
        assert kept.sum() == num_kept
        assert torch.equal(kept, TopPLogitsWarper(top_p)(None, logits)[0].isfinite())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("min_p", [0.001, 0.05, 0.5, 1.0])
def test_min_p_matches_transformers(min_p: float, seed: int) -> None:
    logits = draw_logits(1, VOCAB, seed=seed)
    expected = MinPLogitsWarper(min_p)(None, logits)[0]
    torch.testing.assert_close(keep_min_p(logits[0], min_p), expected)


@pytest.mark.parametrize("way", [w for w in WAYS if w.temperature > 0.1], ids=str)
def test_all_filters_together_match_transformers(way: Settings) -> None:
    logits = draw_logits(5, VOCAB, seed=7)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(way.temperature)])
    if way.top_k > 0:
        warpers.append(TopKLogitsWarper(way.top_k))
    if way.top_p < 1:
        warpers.append(TopPLogitsWarper(way.top_p))
    if way.min_p > 0:
        warpers.append(MinPLogitsWarper(way.min_p))
    expected = torch.softmax(warpers(None, logits), dim=-1)
    actual = torch.stack([compute_chances(row, way) for row in logits])
    torch.testing.assert_close(actual, expected)


def test_draws_follow_the_chances() -> None:
    logits = torch.tensor([0.5, 0.25, 0.0, 0.25]).log().expand(4000, -1)
    for kernels in (reference, native):
        tokens = sample(kernels, logits, [Settings()] * 4000, draw_numbers(4000))
        counts = torch.bincount(tokens, minlength=4)
        torch.testing.assert_close(counts / 4000, logits[0].exp(), atol=0.03, rtol=0)
        assert counts[2] == 0
