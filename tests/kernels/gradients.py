"""Values and all gradients of a kernel against its namesake in `reference`."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.bounds import measure_error, read_bounds
from tests.kernels.drawing import draw
from tramontane.kernels import fused, reference

DTYPES = [torch.float32, torch.bfloat16]


def run_with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], constants: dict[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """The value, and the gradient of each floating input under a random cotangent."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    value = function(*leaves, **constants)
    value.backward(draw(*value.shape, seed=99).to(value.dtype))
    gradients = [leaf.grad for leaf in leaves if leaf.is_floating_point()]
    assert all(gradient is not None for gradient in gradients)
    return value.detach(), gradients


def assert_equal_kernels(
    name: str, inputs: Sequence[Tensor], dtype: torch.dtype, *, backend: ModuleType = fused,
    fp32_inputs: Sequence[int] = (), **constants: Any,
) -> None:  # fmt: skip
    """Compare with `reference` within the table; `fp32_inputs` are those that no model rounds."""
    bounds = read_bounds(name)
    rounded = [
        x.to(dtype) if x.is_floating_point() and i not in fp32_inputs else x
        for i, x in enumerate(inputs)
    ]
    exact = [x.float() if x.is_floating_point() else x for x in rounded]
    actual, gradients = run_with_gradients(getattr(backend, name), rounded, constants)
    expected, expected_gradients = run_with_gradients(getattr(reference, name), exact, constants)
    in_fp32 = dtype == torch.float32
    value_bound = bounds.fp32_values if in_fp32 else bounds.bf16_values
    gradient_bound = bounds.fp32_gradients if in_fp32 else bounds.bf16_gradients
    assert measure_error(actual, expected) <= value_bound
    for i, (gradient, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert measure_error(gradient, wanted) <= gradient_bound, f"gradient {i}"
