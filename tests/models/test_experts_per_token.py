"""A forward pass in which each token uses a number of experts of its own."""

from collections.abc import Callable

import pytest
import torch

from tests.tiny import make_config, make_model, make_tokens
from tramontane.config import MoeConfig
from tramontane.models.transformer import ForwardOutput, Transformer
from tramontane.nn.attention import PackedSequences
from tramontane.quant.apply import quantize_model
from tramontane.quant.formats import QuantFormat, QuantRecipe

COUNTS = (1, 2, 3, 8, 5)
LENGTH = 7  # tokens of each sequence


@pytest.fixture(params=["native", "fused", "reference"])
def backend(request: pytest.FixtureRequest, choose_kernels: Callable[[str], None]) -> str:
    choose_kernels(request.param)
    return request.param


@torch.inference_mode()
def run(model: Transformer, counts: tuple[int, ...]) -> ForwardOutput:
    """Sequences of LENGTH tokens, of which the i-th uses counts[i] experts per token."""
    num_tokens = LENGTH * len(counts)
    positions = torch.arange(LENGTH).repeat(len(counts))
    states = [PackedSequences([LENGTH] * len(counts))] * len(model.layers)
    tokens = make_tokens(LENGTH).repeat(len(counts))
    per_token = torch.tensor(counts).repeat_interleave(LENGTH)
    assert len(per_token) == num_tokens
    return model(tokens, positions, states, experts_per_token=per_token)


def make_models() -> list[Transformer]:
    plain, packed = make_model(), make_model()
    quantize_model(packed, QuantRecipe.from_format(QuantFormat(8)))
    return [plain, packed]


@pytest.mark.parametrize("which", [0, 1], ids=["fp32", "int8"])
def test_a_sequence_among_others_is_what_it_is_alone(backend: str, which: int) -> None:
    model = make_models()[which]
    mixed = run(model, COUNTS)
    for i, count in enumerate(COUNTS):
        rows, alone = slice(i * LENGTH, (i + 1) * LENGTH), run(model, (count,))
        if backend == "native":
            assert torch.equal(mixed.hidden[rows], alone.hidden)
        torch.testing.assert_close(mixed.hidden[rows], alone.hidden, atol=0.05, rtol=0.05)
        for ours, theirs in zip(mixed.routing, alone.routing, strict=True):
            assert theirs.experts.shape == (LENGTH, count)
            assert ours.experts.shape == (LENGTH * len(COUNTS), max(COUNTS))
            assert (ours.experts[rows, count:] == -1).all()
            torch.testing.assert_close(ours.weights.sum(-1), torch.ones(len(ours.weights)))


def test_the_number_of_the_model_is_the_default(backend: str) -> None:
    model = make_model(make_config(moe=MoeConfig(num_experts_per_tok=3)))
    with torch.inference_mode():
        own = model.forward_packed(make_tokens(LENGTH), [LENGTH])
    assert torch.equal(run(model, (3,)).hidden, own.hidden)


def test_other_numbers_give_other_results() -> None:
    model = make_model()
    hidden = [run(model, (count,)).hidden for count in COUNTS]
    for i, one in enumerate(hidden):
        assert not any(torch.equal(one, other) for other in hidden[:i])


def test_a_dense_model_has_no_experts_to_count() -> None:
    with pytest.raises(AssertionError, match="dense model has no experts"):
        run(make_model(make_config(moe=None)), (2,))


@pytest.mark.parametrize("count", [0, 9])
def test_no_number_beyond_the_experts(backend: str, count: int) -> None:
    with pytest.raises(AssertionError):
        run(make_model(), (2, count))
