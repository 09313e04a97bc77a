"""The sparse layer: gradients with every router, dropless against dense networks, layouts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from tests.tiny import make_config, make_model, make_tokens, randomize_
from tramontane.config import ModelConfig, MoeConfig
from tramontane.config.moe import ROUTERS
from tramontane.errors import ConfigError
from tramontane.nn.draws import seed_draws
from tramontane.nn.feed_forward import FeedForward
from tramontane.nn.moe import MoeLayer, ResidualMoeLayer

SMALL = make_config(dim=4, hidden_dim=3, head_dim=2, n_heads=2, n_kv_heads=1)
NAMES = [name for name in ROUTERS if name != "soft"]


def make_layer(
    config: ModelConfig, name: str = "top_k", *, residual: bool = False, **counts: Any
) -> MoeLayer:
    counts.setdefault("num_experts", 4)
    counts.setdefault("num_experts_per_tok", ROUTERS[name].experts_per_tok or 2)
    moe = MoeConfig(**counts, router=name, residual=residual)
    kind = ResidualMoeLayer if residual else MoeLayer
    layer = kind(config, moe, causal=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        randomize_(parameter, generator)
    return layer


def draw(num_tokens: int, dim: int, *, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, dim, generator=torch.Generator().manual_seed(seed))


def check_gradients(layer: MoeLayer, x: Tensor) -> None:
    """All gradients of y against finite differences in float64, along a random direction of each.

    Draws are repeated each time.
    """
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        seed_draws(layer, 0)
        y, _ = functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))
        return y

    leaves = [leaf.double().requires_grad_() for leaf in (x, *parameters.values())]
    assert torch.autograd.gradcheck(run, leaves, atol=1e-7, rtol=1e-5, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_the_layer_with_every_router(name: str) -> None:
    """T05. In float64, as the router decides outside of training."""
    check_gradients(make_layer(SMALL, name).double().eval(), draw(7, 4))


@pytest.mark.parametrize("name", ["switch", "noisy_top_k", "gshard", "st_moe"])
def test_gradcheck_in_training_with_the_same_draws(name: str) -> None:
    """T05. Noise, jitter, second experts at random and drops are constants of the gradient."""
    check_gradients(make_layer(SMALL, name).double().train(), draw(7, 4))


def test_gradcheck_of_the_residual_layout() -> None:
    check_gradients(make_layer(SMALL, residual=True).double(), draw(5, 4))


def run_dense(layer: MoeLayer, x: Tensor, expert: int) -> Tensor:
    """The dense network that one expert is."""
    dense = FeedForward(make_config())
    for matrix in ("w1", "w2", "w3"):
        weight = getattr(layer.experts, matrix)[expert].detach()
        getattr(dense, matrix).weight = torch.nn.Parameter(weight)
    return dense(x)[0]


@pytest.mark.parametrize("num_tokens", [1, 2, 65, 300])
def test_dropless_equals_a_dense_network_when_all_choose_one_expert(num_tokens: int) -> None:
    """S-09. Values, and gradients of the input and of that expert's weights; others get none."""
    layer = make_layer(make_config(), num_experts=8, num_experts_per_tok=1)
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[5, 0] = 1e3
    x = draw(num_tokens, 64).abs().requires_grad_()
    y, routing = layer(x)
    assert (routing.experts == 5).all()
    copy = x.detach().clone().requires_grad_()
    expected = run_dense(layer, copy, 5)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    cotangent = draw(num_tokens, 64, seed=2)
    (ours,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, copy, cotangent)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    y.backward(cotangent)
    for weight in layer.experts.parameters():
        used = weight.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [expert == 5 for expert in range(8)]


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_dropless_equals_dense_networks_when_some_experts_are_chosen_by_none(
    num_tokens: int,
) -> None:
    """S-09. Each token's weighted sum of dense networks, with three of eight experts empty."""
    layer = make_layer(make_config(), num_experts=8, num_experts_per_tok=2)
    x = draw(num_tokens, 64).abs()
    with torch.no_grad():
        layer.gate.weight[5:] = -10.0
        y, routing = layer(x)
        assert routing.experts.max() < 5
        expected = torch.zeros_like(x)
        for expert in range(8):
            weight = routing.weights.where(routing.experts == expert, 0.0).sum(1, keepdim=True)
            expected += weight * run_dense(layer, x, expert)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_residual_layout_equals_its_formula() -> None:
    """S-17. Coefficients as in DeepSpeed: first the experts', then the dense network's."""
    layer = make_layer(make_config(), residual=True)
    x = draw(9, 64)
    y, routing = layer(x)
    sparse = layer.experts(x, routing)
    hidden = F.silu(x @ layer.residual.w1.weight.t()) * (x @ layer.residual.w3.weight.t())
    dense = hidden @ layer.residual.w2.weight.t()
    share = torch.softmax(F.linear(x, layer.mix.weight, layer.mix.bias), -1)
    torch.testing.assert_close(y, share[:, 0:1] * sparse + share[:, 1:2] * dense)


@pytest.mark.parametrize("name", ["top_k", "switch", "biased_top_k", "top_p", "sparse_mixer"])
def test_layouts_and_routers_go_together_in_a_model(name: str) -> None:
    """S-17: a pyramid with residual networks; parameters are counted as they are."""
    moe = MoeConfig(
        8, ROUTERS[name].experts_per_tok or 2, router=name, residual=True, layer_experts=(4, 8)
    )
    config = make_config(moe=moe)
    model = make_model(config)
    assert sum(p.numel() for p in model.parameters()) == config.count_parameters().total
    output = model.forward_packed(make_tokens(20), (12, 8))
    assert [layer.logits.shape[1] for layer in output.routing] == [4, 8]
    output.hidden.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n != "output.weight")


def test_a_pyramid_with_residual_networks_has_fewer_parameters() -> None:
    """S-17."""
    even = make_config(n_layers=4, moe=MoeConfig(8, 2))
    residual = MoeConfig(8, 1, residual=True, layer_experts=(2, 2, 8, 8))
    pyramid = replace(even, moe=residual)
    assert pyramid.count_parameters().total < 0.8 * even.count_parameters().total


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"router": "top_9"}, "top_9"),
        ({"router": ["switch"]}, "switch"),
        ({"router": "switch", "num_experts_per_tok": 2}, "defined for 1"),
        ({"router": "switch", "num_experts_per_tok": 1, "router_options": {"eps": 1}}, "eps"),
        ({"router_options": {"top_p": 0.5}}, "top_p"),
        ({"router": "top_p", "router_options": {"top_p": 1.5}}, "top_p is 1.5"),
        ({"router": "top_p", "router_options": {"top_p": 0.0}}, "top_p is 0.0"),
        ({"router": "top_p", "router_options": 3}, "router_options are 3"),
        ({"router": "st_moe", "router_options": {"threshold": "x"}}, "threshold is 'x'"),
        ({"router": "gshard", "router_options": {"capacity_factor": -1}}, "capacity_factor is -1"),
        ({"layer_experts": [4, 8, 8]}, "3 numbers for 2 layers"),
        ({"layer_experts": [4, 4]}, "num_experts is 8"),
        ({"layer_experts": [2, 8], "num_experts_per_tok": 3}, "only 2 experts"),
        ({"layer_experts": [1, 8], "router": "biased_top_k"}, "want the router 'top_k'"),
        ({"layer_experts": [1, 1], "num_experts": 1}, "only 1 experts"),
        ({"layer_experts": [0, 8]}, "count experts"),
        ({"layer_experts": 8}, "layer_experts"),
        ({"residual": "yes"}, "residual is 'yes'"),
        ({"router": "soft"}, "causal"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], named: str) -> None:
    values = make_config().to_dict()
    values["moe"] = {"num_experts": 8, "num_experts_per_tok": 2, **changes}
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("name", [n for n in ROUTERS if not ROUTERS[n].why_not_causal])
def test_configurations_of_every_router_go_round(name: str) -> None:
    moe = MoeConfig(
        8, ROUTERS[name].experts_per_tok or 2, router=name, residual=True, layer_experts=(4, 8)
    )
    config = make_config(moe=moe)
    assert ModelConfig.from_dict(config.to_dict()) == config
    values = config.to_hf()
    assert values["model_type"] == "tramontane"
    assert ModelConfig.from_hf(values) == config
