"""Every kernel of `fused` equals its namesake in `reference`: values and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.drawing import draw
from tests.kernels.gradients import DTYPES, assert_equal_kernels, run_with_gradients
from tramontane.kernels import fused, reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 65), (0, 8), (3, 2, 33), (129, 1)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = 1 + draw(shape[-1], seed=1, scale=0.1)
    assert_equal_kernels("rms_norm", [draw(*shape), weight], dtype, eps=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 6), (33, 4, 16), (0, 2, 8)])
def test_rotate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    angles = draw(shape[0], shape[2] // 2, seed=1, scale=100.0)
    constants = {"cos": angles.cos(), "sin": angles.sin()}
    assert_equal_kernels("rotate", [draw(*shape)], dtype, **constants)


def draw_attention(
    num_queries: int, num_keys: int, heads: tuple[int, int] = (4, 2), head_dim: int = 16
) -> list[Tensor]:
    return [
        draw(num_queries, heads[0], head_dim),
        draw(heads[1], num_keys, head_dim, seed=1),
        draw(heads[1], num_keys, head_dim, seed=2),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3, 64, 1000])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [(1, 1), (1, 9), (7, 7), (5, 12), (1, 130), (255, 255), (256, 256), (257, 257), (257, 300)],
)
def test_causal_attention(
    num_queries: int, num_keys: int, window: int | None, dtype: torch.dtype
) -> None:
    inputs = draw_attention(num_queries, num_keys)
    assert_equal_kernels("causal_attention", inputs, dtype, window=window)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 1), (6, 3)])
@pytest.mark.parametrize("head_dim", [2, 10, 64])
def test_causal_attention_with_any_heads(heads: tuple[int, int], head_dim: int) -> None:
    inputs = draw_attention(11, 13, heads=heads, head_dim=head_dim)
    assert_equal_kernels("causal_attention", inputs, torch.float32)


def test_causal_attention_without_queries() -> None:
    assert_equal_kernels("causal_attention", draw_attention(0, 5), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize(
    "seqlens",
    [(1,), (0,), (3, 2), (1, 1, 1), (4, 0, 3), (255, 2, 256), (300, 212), (64, 64), (257,)],
)
def test_packed_attention(seqlens: tuple[int, ...], window: int | None, dtype: torch.dtype) -> None:
    total = sum(seqlens)
    inputs = draw_attention(total, total)
    assert_equal_kernels("packed_attention", inputs, dtype, seqlens=seqlens, window=window)


@pytest.mark.parametrize("window", [None, 2])
def test_attention_gradcheck_in_float64(window: int | None) -> None:
    inputs = [x.double().requires_grad_() for x in draw_attention(4, 6, head_dim=4)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: fused.causal_attention(q, k, v, window=window), inputs
    )


def test_attention_plan_made_in_inference_mode_serves_training() -> None:
    inputs = draw_attention(9, 9)
    with torch.inference_mode():
        fused.causal_attention(*inputs)
    assert_equal_kernels("causal_attention", inputs, torch.float32)


def draw_experts(
    experts: Tensor, *, num_experts: int = 8, dim: int = 24, hidden_dim: int = 36
) -> list[Tensor]:
    return [
        draw(len(experts), dim),
        torch.softmax(draw(*experts.shape, seed=1), -1),
        experts,
        draw(num_experts, hidden_dim, dim, seed=2, scale=dim**-0.5),
        draw(num_experts, dim, hidden_dim, seed=3, scale=hidden_dim**-0.5),
        draw(num_experts, hidden_dim, dim, seed=4, scale=dim**-0.5),
    ]


def choose_experts(num_tokens: int, *, num_experts: int = 8, num_chosen: int = 2) -> Tensor:
    """Distinct experts per token, (T, K)."""
    return draw(num_tokens, num_experts, seed=5).argsort(-1)[:, :num_chosen]


LOADS = {
    "random": choose_experts(50),
    "odd": choose_experts(37, num_experts=5, num_chosen=3),
    "all tokens to two experts": torch.tensor([[6, 1]]).expand(130, 2),
    "all tokens to one expert": torch.full((65, 1), 3),
    "every expert sees all": choose_experts(9, num_chosen=8),
    "at the step of rows": torch.full((64, 1), 7),
    "one token": torch.tensor([[2, 5]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
    "some slots unused": torch.tensor([[0, -1], [2, 3], [-1, -1], [-1, 0], [3, 2]]).repeat(30, 1),
    "no slot used": torch.full((7, 2), -1),
    "one token, unused": torch.tensor([[-1]]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("load", LOADS)
def test_moe_experts(load: str, dtype: torch.dtype) -> None:
    inputs = draw_experts(LOADS[load])
    assert_equal_kernels("moe_experts", inputs, dtype, fp32_inputs=[1])


@pytest.mark.parametrize("load", ["odd", "one token", "some slots unused", "no slot used"])
def test_moe_experts_gradcheck_in_float64(load: str) -> None:
    """Dropless, and with slots that a router left empty: every gradient is that of the values."""
    experts = LOADS[load][:9]
    sizes = {"num_experts": 6, "dim": 4, "hidden_dim": 3}
    x, weights, _, *matrices = (
        i.double() if i.is_floating_point() else i for i in draw_experts(experts, **sizes)
    )
    leaves = [x, weights, *matrices]

    def run(x: Tensor, weights: Tensor, *matrices: Tensor) -> Tensor:
        y = fused.moe_experts(x, weights, experts, *matrices)
        torch.testing.assert_close(y, reference.moe_experts(x, weights, experts, *matrices))
        return y

    assert torch.autograd.gradcheck(run, [leaf.requires_grad_() for leaf in leaves])


def test_an_unused_slot_adds_nothing() -> None:
    x, weights, experts, *matrices = draw_experts(torch.tensor([[1, -1], [-1, -1]]))
    y = fused.moe_experts(x, weights, experts, *matrices)
    one = fused.moe_experts(x[:1], weights[:1, :1], experts[:1, :1], *matrices)
    assert torch.equal(y[0], one[0])
    assert y[1].abs().sum() == 0


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 kernels here"
)
def test_slots_are_summed_in_fp32_in_a_bf16_model() -> None:
    """The recipe of bit-exactness: each expert's bf16 output, weighted and summed in fp32, cast."""
    experts = choose_experts(50, num_chosen=4)
    x, weights, _, *matrices = (i.bfloat16() for i in draw_experts(experts))
    weights = weights.float()
    total = torch.zeros(x.shape)
    for k in range(4):
        one = torch.ones(50, 1)
        out = fused.moe_experts(x, one, experts[:, k : k + 1], *matrices)  # (T, D) of slot k
        total += weights[:, k : k + 1] * out.float()
    assert torch.equal(fused.moe_experts(x, weights, experts, *matrices), total.bfloat16())


def test_experts_without_tokens_have_zero_gradients() -> None:
    inputs = draw_experts(torch.full((9, 1), 3))
    _, gradients = run_with_gradients(fused.moe_experts, inputs, {})
    for gradient in gradients[2:]:
        used = torch.arange(8) == 3
        assert gradient[used].abs().sum() > 0
        assert gradient[~used].abs().sum() == 0


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(0, 80),
    num_experts=st.integers(1, 9),
    num_chosen=st.integers(1, 9),
    dim=st.integers(1, 40),
)
def test_moe_experts_of_any_size(
    num_tokens: int, num_experts: int, num_chosen: int, dim: int
) -> None:
    experts = choose_experts(
        num_tokens, num_experts=num_experts, num_chosen=min(num_chosen, num_experts)
    )
    inputs = draw_experts(experts, num_experts=num_experts, dim=dim)
    assert_equal_kernels("moe_experts", inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 31, 511, 512, 513])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_linear_cross_entropy(num_tokens: int, ignored: str, dtype: torch.dtype) -> None:
    targets = torch.randint(101, (num_tokens,), generator=torch.Generator().manual_seed(7))
    if ignored != "none":
        targets[:: 3 if ignored == "some" else 1] = -100
    inputs = [draw(num_tokens, 24), draw(101, 24, seed=1, scale=0.2)]
    assert_equal_kernels("linear_cross_entropy", inputs, dtype, targets=targets)


def test_linear_cross_entropy_of_an_impossible_target_is_finite() -> None:
    hidden, weight = torch.full((1, 4), 100.0), torch.tensor([[1.0] * 4, [-1.0] * 4])
    value, gradients = run_with_gradients(
        fused.linear_cross_entropy, [hidden, weight], {"targets": torch.tensor([1])}
    )
    assert torch.isfinite(value)
    assert value > 80
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_linear_cross_entropy_refuses_a_target_outside_the_vocabulary() -> None:
    for target in (-1, 5):
        with pytest.raises((IndexError, RuntimeError)):
            fused.linear_cross_entropy(draw(1, 4), draw(5, 4), torch.tensor([target]))
