"""Mixtral's router against that of transformers (softmax over all experts, then renormalised)."""

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from tests.tiny import make_config, make_model


def draw_hidden(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_routing_equals_transformers() -> None:
    gate = make_model(make_config()).layers[0].feed_forward.gate
    oracle = MixtralTopKRouter(MixtralConfig(hidden_size=64, num_local_experts=8))
    oracle.weight.copy_(gate.weight)
    x = draw_hidden(200)
    logits, weights, experts = oracle(x)
    routing = gate(x)
    assert torch.equal(routing.experts, experts)
    torch.testing.assert_close(routing.weights, weights)
    torch.testing.assert_close(routing.logits, logits)


@torch.no_grad()
def test_routing_of_a_bf16_model_is_fp32() -> None:
    gate = make_model(make_config()).layers[0].feed_forward.gate.bfloat16()
    routing = gate(draw_hidden(5).bfloat16())
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(5))
