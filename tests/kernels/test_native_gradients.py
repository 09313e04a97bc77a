"""What the native kernels differentiate equals `reference`, on every instruction set here."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.drawing import draw
from tests.kernels.gradients import DTYPES, assert_equal_kernels, run_with_gradients
from tests.kernels.instruction_sets import INSTRUCTION_SETS, use_instruction_set
from tramontane.kernels import native


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def _instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_instruction_set(request.param):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 65), (0, 8), (3, 2, 33), (129, 1), (600, 256)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = 1 + draw(shape[-1], seed=1, scale=0.1)
    assert_equal_kernels("rms_norm", [draw(*shape), weight], dtype, backend=native, eps=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 6), (33, 4, 16), (0, 2, 8)])
def test_rotate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    angles = draw(shape[0], shape[2] // 2, seed=1, scale=100.0)
    constants = {"cos": angles.cos(), "sin": angles.sin()}
    assert_equal_kernels("rotate", [draw(*shape)], dtype, backend=native, **constants)


def test_rotate_by_several_threads() -> None:
    angles = draw(400, 32, seed=1, scale=100.0)
    constants = {"cos": angles.cos(), "sin": angles.sin()}
    x = draw(400, 8, 64)
    assert_equal_kernels("rotate", [x], torch.float32, backend=native, **constants)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (64, 16), (1025,), (70, 2100)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [draw(*shape, scale=3.0), draw(*shape, seed=1)]
    assert_equal_kernels("swiglu", inputs, dtype, backend=native)


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.0, -1e-30, 0.0, 88.0, 200.0, 1e30])
def test_swiglu_of_extreme_numbers(value: float) -> None:
    gate = torch.full((17,), value)
    assert_equal_kernels("swiglu", [gate, torch.ones(17)], torch.float32, backend=native)


def test_nan_stays_nan() -> None:
    x = draw(3, 40)
    x[1, 7] = float("nan")
    for name, inputs, constants in (
        ("rms_norm", [x, torch.ones(40)], {"eps": 1e-5}),
        ("swiglu", [x, torch.ones(3, 40)], {}),
    ):
        value, gradients = run_with_gradients(getattr(native, name), inputs, constants)
        assert not value[1].isfinite().all()
        assert not gradients[0][1].isfinite().all()
        assert gradients[0][[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 300])
def test_experts_with_the_native_activation(num_tokens: int, dtype: torch.dtype) -> None:
    dim, hidden_dim, num_experts = 24, 36, 8
    experts = draw(num_tokens, num_experts, seed=5).topk(2).indices
    inputs = [
        draw(num_tokens, dim),
        torch.softmax(draw(num_tokens, 2, seed=1), -1),
        experts,
        draw(num_experts, hidden_dim, dim, seed=2, scale=dim**-0.5),
        draw(num_experts, dim, hidden_dim, seed=3, scale=hidden_dim**-0.5),
        draw(num_experts, hidden_dim, dim, seed=4, scale=dim**-0.5),
    ]
    assert_equal_kernels("moe_experts", inputs, dtype, backend=native, fp32_inputs=[1])


def differentiate(x: Tensor, weight: Tensor) -> list[Tensor]:
    """A gradient that is not contiguous reaches the kernels, as attention leaves it."""
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    normed = native.rms_norm(*leaves, eps=1e-5)
    turned = native.rotate(normed.view(-1, 4, 16), *(torch.ones(len(x), 8),) * 2)
    native.swiglu(turned, turned).transpose(0, 1).contiguous().pow(2).sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return gradients  # type: ignore[return-value]


def test_gradients_repeat_to_the_bit_whatever_the_number_of_threads() -> None:
    """T06: sums over tokens are in one order."""
    x, weight = draw(1000, 64).bfloat16(), (1 + draw(64, seed=1) * 0.1).bfloat16()
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = differentiate(x, weight)
        torch.set_num_threads(3)
        for _ in range(5):
            found = differentiate(x, weight)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(num_threads)


def test_what_the_extension_does_not_have_runs_in_torch() -> None:
    x = draw(5, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: native.swiglu(y, y), (x,))
