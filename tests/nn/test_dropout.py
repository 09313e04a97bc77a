"""Dropout: how much, where from, and that only training knows it."""

import pytest
import torch

from tests.tiny import make_config, make_model
from tramontane.nn.draws import Draws, read_draws, restore_draws, seed_draws
from tramontane.nn.dropout import Dropout, set_dropout


def make_dropout(rate: float, *stream: int) -> Dropout:
    dropout = Dropout(*stream)
    set_dropout(dropout, rate)
    return dropout


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(400, 301), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_asked_share_is_zero_and_the_rest_scaled(
    rate: float, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    x = torch.full(shape, 3.0, dtype=dtype)
    y = make_dropout(rate, 0)(x)
    kept = y != 0
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert torch.equal(y[kept], (x / (1 - rate))[kept])
    dropped, expected = x.numel() - int(kept.sum()), rate * x.numel()
    assert abs(dropped - expected) <= 5 * (expected * (1 - rate)) ** 0.5


def test_gradients_pass_where_values_did() -> None:
    x = torch.ones(64, 5, requires_grad=True)
    y = make_dropout(0.5, 0)(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_streams_and_draws_differ_and_can_be_repeated() -> None:
    x = torch.ones(64, 64)
    one, other = make_dropout(0.5, 0, 1), make_dropout(0.5, 0, 2)
    first, second, elsewhere = one(x), one(x), other(x)
    for a, b in ((first, second), (first, elsewhere)):
        assert (a == b).float().mean() == pytest.approx(0.5, abs=0.05)
    seed_draws(one, 0)
    assert torch.equal(one(x), first)
    seed_draws(one, 1)
    assert not torch.equal(one(x), first)


def test_no_two_streams_of_any_length_share_their_numbers() -> None:
    streams = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0)]
    draws = [Draws(*stream) for stream in streams]
    seeds = [d.next_generator(torch.device("cpu")).initial_seed() for d in draws for _ in range(4)]
    assert len(set(seeds)) == len(streams) * 4


def test_a_model_drops_in_training_alone_and_goes_on_where_it_was() -> None:
    model = make_model(make_config())
    tokens = torch.arange(12)

    def run() -> torch.Tensor:
        return model.forward_packed(tokens, (12,)).hidden

    model.train()
    plain = run()
    set_dropout(model, 0.3)
    state = read_draws(model)
    first = run()
    assert not torch.allclose(first, plain)
    assert not torch.equal(run(), first)
    restore_draws(model, state)
    assert torch.equal(run(), first)
    model.eval()
    before = read_draws(model)
    assert torch.equal(run(), plain)
    assert read_draws(model) == before
    assert sum(count for _, count in before.values()) == 2 * model.config.n_layers + 1
