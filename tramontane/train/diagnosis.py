"""Where the first NaN or infinity of a forward pass arises."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@torch.no_grad()
def find_bad_tensor(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The first parameter that is not finite, or the first output of a module while `run` runs.

    None if all are finite. `run` is a forward pass of `model`.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return name
    with _watch_outputs(model) as bad:
        run()
    return f"the output of {bad[0]}" if bad else None


@contextmanager
def _watch_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Yields the names, in order, of the innermost modules whose output is not finite."""
    bad: list[str] = []

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            if not _is_finite(output):
                bad.append(name)

        return module.register_forward_hook(look)

    innermost = [pair for pair in model.named_modules() if not any(pair[1].children())]
    hooks = [watch(*pair) for pair in innermost]
    try:
        yield bad
    finally:
        for hook in hooks:
            hook.remove()


def _is_finite(output: object) -> bool:
    """Of a tensor, or of the tensors in a tuple."""
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    return all(map(_is_finite, output)) if isinstance(output, tuple) else True
