"""The specification itself, against formulae written another way."""

import math

import pytest
import torch
import torch.nn.functional as F

from tramontane.kernels import reference

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def test_rms_norm_equals_torch() -> None:
    x, weight = draw(5, 33), draw(33)
    expected = F.rms_norm(x, (33,), weight, eps=1e-5)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), expected)


def test_rms_norm_in_bf16_is_computed_in_fp32_and_cast_before_the_weight() -> None:
    x, weight = (100 * draw(5, 64)).bfloat16(), draw(64).bfloat16()
    normed = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = normed.bfloat16() * weight
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), expected)


def test_rotate_multiplies_complex_pairs() -> None:
    x, angles = draw(6, 3, 8), draw(6, 4)
    pairs = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[:, None]
    expected = torch.cat((pairs.real, pairs.imag), dim=-1)
    torch.testing.assert_close(reference.rotate(x, angles.cos(), angles.sin()), expected)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (9, 9), (3, 9)])
def test_causal_attention_equals_torch(num_queries: int, num_keys: int, window: int | None) -> None:
    q, k, v = draw(num_queries, 4, 8), draw(2, num_keys, 8), draw(2, num_keys, 8)
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    visible = (distance >= 0) & (distance < (window or num_keys))
    expected = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=visible, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(
        reference.causal_attention(q, k, v, window=window), expected, rtol=1e-5, atol=1e-6
    )


def test_top_k_routing_of_equal_logits_takes_the_lower_expert() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 5.0]])
    weights, experts = reference.top_k_routing(logits, 2)
    assert experts.tolist() == [[1, 2], [0, 1], [3, 0]]
    assert weights[:2].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert weights[2, 1].item() == pytest.approx(1 / (1 + math.exp(2)))


def test_top_k_routing_breaks_ties_so_among_many_experts() -> None:
    logits = torch.zeros(3, 1000)
    assert reference.top_k_routing(logits, 6)[1].tolist() == [[0, 1, 2, 3, 4, 5]] * 3


def test_top_k_routing_in_bf16_gives_fp32_weights() -> None:
    weights, _ = reference.top_k_routing(draw(7, 8).bfloat16(), 2)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))
    assert (weights[:, 0] >= weights[:, 1]).all()


def test_moe_experts_equals_the_equation_token_by_token() -> None:
    x, weights = draw(5, 6), draw(5, 2).softmax(-1)
    experts = torch.tensor([[0, 1], [1, 0], [2, 0], [2, 1], [0, 2]])
    w1, w2, w3 = draw(3, 4, 6), draw(3, 6, 4), draw(3, 4, 6)
    y = torch.stack([
        sum(
            weights[t, k] * (w2[e] @ (F.silu(w1[e] @ x[t]) * (w3[e] @ x[t])))
            for k, e in enumerate(experts[t])
        )
        for t in range(5)
    ])  # fmt: skip
    torch.testing.assert_close(reference.moe_experts(x, weights, experts, w1, w2, w3), y)


def test_linear_cross_entropy_counts_only_targets() -> None:
    hidden, weight, targets = draw(4, 6), draw(9, 6), torch.tensor([1, -100, 8, -100])
    log_probs = torch.log_softmax(hidden @ weight.t(), -1)
    expected = -(log_probs[0, 1] + log_probs[2, 8])
    torch.testing.assert_close(reference.linear_cross_entropy(hidden, weight, targets), expected)
