"""What must not matter to a sparse layer: the numbering of experts, and those not selected."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import make_config, make_model
from tramontane.config import MoeConfig
from tramontane.nn.moe import MoeLayer

DIM = make_config().dim


def make_layer(num_experts: int = 8, num_experts_per_tok: int = 2) -> MoeLayer:
    moe = MoeConfig(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok)
    return make_model(make_config(moe=moe, n_layers=1)).layers[0].feed_forward


def draw_hidden(num_tokens: int, *, seed: int = 1) -> Tensor:
    return torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def permute_experts_(layer: MoeLayer, order: Tensor) -> None:
    for weight in (layer.gate.weight, *layer.experts.parameters()):
        weight.copy_(weight[order].clone())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_renumbering_experts_gives_the_same_bits(dtype: torch.dtype, seed: int) -> None:
    """The sum runs in slot order in fp32; in expert order it would differ in the last bits."""
    layer = make_layer(num_experts_per_tok=3).to(dtype)
    x = draw_hidden(100).to(dtype)
    before, routing = layer(x)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    permute_experts_(layer, order)
    after, permuted = layer(x)
    assert torch.equal(order[permuted.experts], routing.experts)
    assert torch.equal(before, after)


@torch.no_grad()
def test_experts_that_are_not_selected_do_not_matter() -> None:
    layer = make_layer()
    x = draw_hidden(1)
    before, routing = layer(x)
    is_idle = torch.ones(8, dtype=torch.bool)
    is_idle[routing.experts.flatten()] = False
    for weight in layer.experts.parameters():
        weight[is_idle] = float("nan")
    assert torch.equal(layer(x)[0], before)


@torch.no_grad()
@pytest.mark.parametrize("num_experts_per_tok", [1, 2, 8])
def test_only_the_selected_experts_compute(
    num_experts_per_tok: int, choose_kernels: Callable[[str], None]
) -> None:
    """Of E * T rows, K * T run: the work is K / E of that of a layer where all experts see all."""
    choose_kernels("fused")  # torch counts its own products
    num_tokens = 40
    layer = make_layer(num_experts_per_tok=num_experts_per_tok)
    x = draw_hidden(num_tokens)
    routing = layer.gate(x)
    with FlopCounterMode(display=False) as counter:
        layer.experts(x, routing)
    per_row = 3 * 2 * DIM * make_config().hidden_dim  # three matrices, multiply and add
    assert counter.get_total_flops() == num_tokens * num_experts_per_tok * per_row


def test_losing_experts_learn_nothing_and_their_logits_neither() -> None:
    layer = make_layer()
    y, routing = layer(draw_hidden(1))
    y.sum().backward()
    is_selected = torch.zeros(8, dtype=torch.bool)
    is_selected[routing.experts.flatten()] = True
    for weight in (layer.gate.weight, *layer.experts.parameters()):
        moved = weight.grad.flatten(1).abs().sum(1) > 0
        assert torch.equal(moved, is_selected)


@torch.no_grad()
def test_rows_of_padding_never_reach_the_output(choose_kernels: Callable[[str], None]) -> None:
    """Beyond 64 rows an expert's rows are padded with copies of slot 0."""
    choose_kernels("fused")
    layer = make_layer(num_experts=2, num_experts_per_tok=2)
    x = draw_hidden(65)
    routing = layer.gate(x)
    alone = torch.cat([
        layer.experts(x[t : t + 1], type(routing)(*(part[t : t + 1] for part in routing[:3])))
        for t in range(65)
    ])  # fmt: skip
    torch.testing.assert_close(layer.experts(x, routing), alone, rtol=1e-5, atol=1e-6)
