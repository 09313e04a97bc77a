"""The whole model against transformers with the same weights: logits and every gradient, fp32.

Bounds are relative to the largest entry of each tensor (`measure_error`): 1e-5 for logits, which
are of order one, and 1e-4 for gradients.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.bounds import measure_error
from tests.oracles.hf import (
    collect_gradients,
    compute_hf_logits,
    from_hf_model,
    to_hf_model,
    to_hf_tensors,
)
from tests.tiny import make_config, make_model, make_tokens
from tramontane.config import MoeConfig
from tramontane.models.transformer import Transformer, build_model

CONFIGS = {
    "mixtral": make_config(),
    "mistral": make_config(moe=None),
    "every head its own keys": make_config(n_kv_heads=4),
    "one key head": make_config(n_kv_heads=1),
    "heads wider than dim": make_config(head_dim=24),
    "window": make_config(sliding_window=10),
    "dense window": make_config(moe=None, sliding_window=10),
    "tied": make_config(tie_embeddings=True),
    "all experts": make_config(moe=MoeConfig(num_experts=3, num_experts_per_tok=3)),
    "large theta": make_config(rope_theta=1e6, norm_eps=1e-6),
}


def compute_logits(model: Transformer, tokens: Tensor, seqlens: tuple[int, ...] = ()) -> Tensor:
    return model.compute_logits(model.forward_packed(tokens, seqlens or (len(tokens),)).hidden)


def record_embeddings(model: Transformer) -> list[Tensor]:
    """A list that receives the embeddings (T, D) of each later call."""
    embedded: list[Tensor] = []
    model.tok_embeddings.register_forward_hook(lambda *call: embedded.append(call[-1]))
    return embedded


def draw_like(logits: Tensor) -> Tensor:
    return torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=["native", "fused", "reference"])
def _each_backend(request: pytest.FixtureRequest, choose_kernels: Callable[[str], None]) -> None:
    choose_kernels(request.param)


@pytest.mark.usefixtures("_each_backend")
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    model = make_model(CONFIGS[name])
    hf_model = to_hf_model(model)
    tokens = make_tokens(51)  # five windows of 10 and one
    logits, expected = compute_logits(model, tokens), compute_hf_logits(hf_model, tokens)
    assert measure_error(logits, expected) <= 1e-5
    (logits * draw_like(logits)).sum().backward()
    (expected * draw_like(expected)).sum().backward()
    gradients = to_hf_tensors(collect_gradients(model), model.config)
    for key, wanted in collect_gradients(hf_model).items():
        assert measure_error(gradients[key], wanted) <= 1e-4, key


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "window"])
def test_logits_equal_transformers_beyond_one_attention_block(name: str) -> None:
    model = make_model(CONFIGS[name])
    tokens = make_tokens(256 + 21)
    expected = compute_hf_logits(to_hf_model(model), tokens)
    assert measure_error(compute_logits(model, tokens), expected) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "mistral", "tied"])
def test_weights_of_transformers_give_its_logits(name: str) -> None:
    hf_model = to_hf_model(make_model(CONFIGS[name], seed=3))
    tokens = make_tokens(20)
    logits = compute_logits(from_hf_model(hf_model), tokens)
    assert measure_error(logits, compute_hf_logits(hf_model, tokens)) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "window"])
@pytest.mark.parametrize("seqlens", [(20, 30), (1, 1, 48), (49, 1), (7, 13, 11, 19)])
def test_packed_sequences_equal_single_ones(name: str, seqlens: tuple[int, ...]) -> None:
    model = make_model(CONFIGS[name])
    tokens = make_tokens(50)
    packed = compute_logits(model, tokens, seqlens)
    single = torch.cat([compute_logits(model, part) for part in tokens.split(list(seqlens))])
    assert measure_error(packed, single) <= 1e-5


@torch.no_grad()
def test_top_1_of_experts_equals_transformers() -> None:
    """Logits alone: one expert has weight 1, so the gate's gradient is noise in both."""
    moe = MoeConfig(num_experts=4, num_experts_per_tok=1)
    model, tokens = make_model(make_config(moe=moe)), make_tokens(51)
    expected = compute_hf_logits(to_hf_model(model), tokens)
    assert measure_error(compute_logits(model, tokens), expected) <= 1e-5


@torch.no_grad()
def test_a_document_does_not_see_another() -> None:
    model = make_model()
    tokens = make_tokens(50)
    changed = tokens.clone()
    changed[25] = (tokens[25] + 1) % 128
    before = compute_logits(model, tokens, (20, 15, 15))
    after = compute_logits(model, changed, (20, 15, 15))
    # Not exactly zero: in fp32 the last bit of a product may depend on the number of its rows.
    is_same = (before - after).abs().amax(-1) < 1e-5
    assert is_same.tolist() == [not 25 <= i < 35 for i in range(50)]


def test_no_gradient_crosses_documents() -> None:
    model = make_model()
    embedded = record_embeddings(model)
    logits = compute_logits(model, make_tokens(50), (20, 15, 15))
    (gradient,) = torch.autograd.grad(logits[20:35].sum(), embedded)
    is_seen = (gradient != 0).any(-1)
    assert is_seen.tolist() == [20 <= i < 35 for i in range(50)]


@pytest.mark.parametrize(("window", "num_layers"), [(1, 2), (4, 1), (4, 3), (7, 2)])
def test_information_reaches_as_far_as_windows_stack(window: int, num_layers: int) -> None:
    """A window counts the token itself, so L layers reach L * (W - 1) tokens back."""
    model = make_model(make_config(sliding_window=window, n_layers=num_layers))
    embedded = record_embeddings(model)
    logits = compute_logits(model, make_tokens(30))
    (gradient,) = torch.autograd.grad(logits[-1].sum(), embedded)
    is_seen = (gradient != 0).any(-1)
    reach = num_layers * (window - 1)
    assert is_seen.tolist() == [29 - i <= reach for i in range(30)]


def test_tied_head_is_one_parameter() -> None:
    model = build_model(make_config(tie_embeddings=True))
    assert model.output.weight is model.tok_embeddings.weight
    assert "output.weight" not in dict(model.named_parameters())


@torch.no_grad()
def test_logits_of_a_bf16_model_are_fp32_and_close() -> None:
    model = make_model()
    expected = compute_logits(model, make_tokens(40))
    logits = compute_logits(model.bfloat16(), make_tokens(40))
    assert logits.dtype == torch.float32
    assert (logits - expected).pow(2).mean().sqrt() <= 0.1 * expected.std()


@torch.no_grad()
def test_forward_returns_the_routing_of_each_layer() -> None:
    output = make_model().forward_packed(make_tokens(9), (9,))
    assert len(output.routing) == 2
    for routing in output.routing:
        assert routing.weights.shape == routing.experts.shape == (9, 2)
        assert routing.logits.shape == (9, 8)
    assert make_model(CONFIGS["mistral"]).forward_packed(make_tokens(9), (9,)).routing == ()
