"""The router's losses against transformers and closed forms."""

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.tiny import make_config, make_model, make_tokens, randomize_
from tramontane.config import MoeConfig
from tramontane.config.moe import ROUTERS
from tramontane.data.packing import PackedBatch
from tramontane.kernels.reference import top_k_routing
from tramontane.nn.draws import seed_draws
from tramontane.nn.moe import MoeLayer
from tramontane.nn.router import Routing
from tramontane.nn.routers.capacity import limit_to_capacity
from tramontane.train.losses import (
    compute_load,
    compute_load_balancing_loss,
    compute_next_token_loss,
    compute_router_entropy,
    compute_router_z_loss,
    count_tokens_per_expert,
)


def make_routing(logits: torch.Tensor, *, num_experts_per_tok: int = 2) -> Routing:
    return Routing(*top_k_routing(logits, num_experts_per_tok), logits)


def test_one_layer_equals_transformers() -> None:
    logits = torch.randn(37, 8, generator=torch.Generator().manual_seed(0))
    expected = load_balancing_loss_func((logits,), num_experts=8, top_k=2)
    torch.testing.assert_close(compute_load_balancing_loss([make_routing(logits)]), expected)


def test_layers_are_not_pooled() -> None:
    """Two layers that collapse on opposite experts look balanced when pooled; here they do not."""
    first = torch.full((64, 4), -20.0)
    second = first.clone()
    first[:, :2], second[:, 2:] = 20.0, 20.0
    assert load_balancing_loss_func((first, second), num_experts=4, top_k=2) == pytest.approx(2.0)
    both = compute_load_balancing_loss([make_routing(first), make_routing(second)])
    assert both.item() == pytest.approx(4.0)


def test_dense_layers_are_left_out() -> None:
    """A layer of one expert has no choice to balance, and does not thin out the terms of others."""
    logits = torch.randn(37, 8, generator=torch.Generator().manual_seed(3))
    sparse, dense = make_routing(logits), make_routing(logits[:, :1], num_experts_per_tok=1)
    for term in (compute_load_balancing_loss, compute_router_z_loss, compute_router_entropy):
        torch.testing.assert_close(term([dense, sparse]), term([sparse]))
    assert compute_load_balancing_loss([dense]).item() == 0


def test_balanced_routing_gives_k() -> None:
    logits = 5.0 * torch.eye(8).roll(1, 1) + 5.0 * torch.eye(8)
    assert compute_load_balancing_loss([make_routing(logits)]).item() == pytest.approx(2.0)


def test_gradient_of_balancing_equals_finite_differences() -> None:
    """T05. In float64; the counts are constants of the gradient, as transformers has it."""
    logits = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    experts = make_routing(logits).experts

    def balance(x: torch.Tensor) -> torch.Tensor:
        return compute_load_balancing_loss([Routing(torch.empty(0), experts, x)])

    assert torch.autograd.gradcheck(balance, (logits.requires_grad_(),))


def test_conventions_differ_by_k_and_equal_their_formulas() -> None:
    """transformers' and MegaBlocks' (batched_load_balancing_loss), in numpy and float64."""
    logits = torch.randn(37, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    routing = make_routing(logits)
    probs = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(-1, keepdims=True)
    counts = np.bincount(routing.experts.numpy().ravel(), minlength=8)
    megablocks = 8 / (37 * 2) * counts @ probs.mean(0)
    ours = compute_load_balancing_loss([routing], convention="megablocks")
    assert ours.item() == pytest.approx(megablocks, rel=1e-12)
    hf = compute_load_balancing_loss([routing], convention="hf")
    assert hf.item() == pytest.approx(2 * megablocks, rel=1e-12)
    balanced = 5.0 * torch.eye(8).roll(1, 1) + 5.0 * torch.eye(8)
    even = compute_load_balancing_loss([make_routing(balanced)], convention="megablocks")
    assert even.item() == pytest.approx(1.0)


def test_loads_of_more_tokens_make_parts_add_up() -> None:
    """T06: with the load of all tokens, the mean over two halves is the loss of the whole."""
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    whole, parts = make_routing(logits), [make_routing(half) for half in logits.split(20)]
    for convention in ("hf", "megablocks"):
        expected = compute_load_balancing_loss([whole], convention=convention)
        loads = [compute_load(whole)]
        halves = [
            compute_load_balancing_loss([part], loads=loads, convention=convention)
            for part in parts
        ]
        torch.testing.assert_close(sum(halves) / 2, expected)


PADDING = [0.0, 0.1, 0.5, 0.9]


def pad(routing: Routing, share: float) -> tuple[Routing, torch.Tensor]:
    """Wild tokens put between the real ones until they are `share` of all, and the mask."""
    num_real = len(routing.logits)
    num_all = round(num_real / (1 - share))
    generator = torch.Generator().manual_seed(8)
    mask = torch.zeros(num_all, dtype=torch.bool)
    mask[torch.randperm(num_all, generator=generator)[:num_real]] = True
    logits = torch.full((num_all, routing.logits.shape[1]), 1e4, dtype=routing.logits.dtype)
    padded = make_routing(logits)
    for mine, theirs in zip(padded[:3], routing[:3], strict=True):
        mine[mask] = theirs.to(mine.dtype)
    return padded, mask


@pytest.mark.parametrize("share", PADDING)
def test_padding_never_counts(share: float) -> None:
    """T05: in no loss, in no load."""
    logits = torch.randn(20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    routing = make_routing(logits)
    padded, mask = pad(routing, share)
    for compute in (
        compute_load_balancing_loss,
        compute_router_z_loss,
        compute_router_entropy,
        lambda layers, mask=None: compute_load_balancing_loss(
            layers, convention="megablocks", mask=mask
        ),
        lambda layers, mask=None: count_tokens_per_expert(layers[0], mask=mask),
    ):
        torch.testing.assert_close(compute([padded], mask=mask), compute([routing]))
        if share:
            assert not torch.allclose(compute([padded]), compute([routing]))


@pytest.mark.parametrize("share", PADDING)
@pytest.mark.parametrize("name", ["top_k", "switch", "noisy_top_k", "st_moe", "top_p"])
def test_gradients_of_the_router_equal_finite_differences(name: str, share: float) -> None:
    """T05: task, balance, z and entropy together, to the gate, in float64; relative error 1e-5."""
    num_real, num_all = 12, round(12 / (1 - share))
    moe = MoeConfig(4, ROUTERS[name].experts_per_tok or 2, router=name)
    layer = MoeLayer(make_config(dim=4, hidden_dim=3), moe).double().train()
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        randomize_(parameter, generator)
    x = torch.randn(num_all, 4, dtype=torch.float64, generator=generator)
    mask = torch.arange(num_all) % (num_all // num_real) == 0
    mask &= mask.cumsum(0) <= num_real
    assert mask.sum() == num_real

    def compute() -> torch.Tensor:
        seed_draws(layer, 0)
        y, routing = layer(x)
        router = compute_load_balancing_loss([routing], mask=mask)
        router = router + 0.5 * compute_router_z_loss([routing], mask=mask)
        router = router - 0.3 * compute_router_entropy([routing], mask=mask)
        return y[mask].sin().sum() + router

    weight = layer.gate.weight
    (gradient,) = torch.autograd.grad(compute(), weight)
    numeric = torch.zeros_like(weight)
    with torch.no_grad():
        for index in np.ndindex(*weight.shape):
            values, kept = [], weight[index].item()
            for step in (1e-6, -1e-6):
                weight[index] = kept + step
                values.append(compute())
            weight[index] = kept
            numeric[index] = (values[0] - values[1]) / 2e-6
    error = (gradient - numeric).norm() / numeric.norm()
    assert error < 1e-5


def test_choices_count_before_capacity_drops_them() -> None:
    """A full expert looks as loaded as it is wanted."""
    logits = torch.zeros(8, 4)
    logits[:, 1] = 5.0
    wanted = Routing(torch.ones(8, 1), torch.ones(8, 1, dtype=torch.int64), logits)
    limited = limit_to_capacity(wanted, 1.0)
    assert (limited.experts == 1).sum() == 2
    assert count_tokens_per_expert(limited).tolist() == [0, 8, 0, 0]
    expected = compute_load_balancing_loss([wanted])
    assert torch.equal(compute_load_balancing_loss([limited]), expected)


def test_router_entropy_of_known_distributions() -> None:
    even, sure = torch.zeros(3, 4), torch.tensor([[50.0, 0, 0, 0]]).repeat(3, 1)
    assert compute_router_entropy([make_routing(even)]).item() == pytest.approx(np.log(4))
    assert compute_router_entropy([make_routing(sure)]).item() == pytest.approx(0, abs=1e-12)
    both = compute_router_entropy([make_routing(even), make_routing(sure)]).item()
    assert both == pytest.approx(np.log(4) / 2)


def test_no_token_is_no_loss() -> None:
    """T23."""
    routing = [make_routing(torch.randn(5, 4))]
    nobody = torch.zeros(5, dtype=torch.bool)
    for convention in ("hf", "megablocks"):
        assert compute_load_balancing_loss(routing, convention=convention, mask=nobody) == 0
    assert compute_router_z_loss(routing, mask=nobody) == 0


def test_router_z_is_the_mean_squared_logsumexp() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    values = np.array([np.log(2), np.log(np.e + np.e**3)])
    assert compute_router_z_loss([make_routing(logits)]).item() == pytest.approx((values**2).mean())


def test_dense_models_have_no_router_terms() -> None:
    assert compute_load_balancing_loss(()) == 0
    assert compute_router_z_loss(()) == 0


def test_objective_is_the_sum_over_counted_targets() -> None:
    model, tokens = make_model(), make_tokens(12).numpy()
    targets = np.roll(tokens, -1)
    targets[[3, 11]] = -100
    batch = PackedBatch(tokens, targets, (5, 7), ("a", "b"))
    terms = compute_next_token_loss(model, batch)
    logits = model.compute_logits(model.forward_packed(torch.from_numpy(tokens), (5, 7)).hidden)
    expected = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(targets), ignore_index=-100, reduction="sum"
    )
    assert terms.num_units == 10
    torch.testing.assert_close(terms.objective, expected)


def test_a_batch_without_targets_is_zero_not_nan() -> None:
    """T23."""
    tokens = make_tokens(6).numpy()
    batch = PackedBatch(tokens, np.full(6, -100), (6,), ("a",))
    terms = compute_next_token_loss(make_model(), batch)
    assert terms.num_units == 0
    assert terms.objective.item() == 0.0
