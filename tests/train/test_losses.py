"""The router's losses against transformers and closed forms."""

import numpy as np
import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.tiny import make_model, make_tokens
from tramontane.data.packing import PackedBatch
from tramontane.kernels.reference import top_k_routing
from tramontane.nn.router import Routing
from tramontane.train.losses import (
    compute_load_balancing_loss,
    compute_next_token_loss,
    compute_router_z_loss,
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
