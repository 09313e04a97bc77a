"""What routers keep beside their weights: random numbers and biases, for a run's checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tramontane.nn.draws import read_draws, restore_draws
from tramontane.nn.router import Router
from tramontane.nn.routers.biased_top_k import BiasedTopKRouter


def move_biases(model: nn.Module, counts: Sequence[Tensor], *, rate: float) -> None:
    """Move the bias of each router that has one, by the choices (E,) of each layer in a step."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if not any(isinstance(router, BiasedTopKRouter) for router in routers):
        return
    for router, layer_counts in zip(routers, counts, strict=True):
        if isinstance(router, BiasedTopKRouter):
            router.move_bias(layer_counts, rate=rate)


def read_router_state(model: nn.Module) -> dict[str, Any]:
    """Everything to continue bit by bit, as JSON values; fp32 numbers survive that."""
    biases = {name: router.expert_bias.tolist() for name, router in _find_biased(model)}
    return {"draws": read_draws(model), "biases": biases}


@torch.no_grad()
def restore_router_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Take back what `read_router_state` gave."""
    restore_draws(model, state["draws"])
    for name, router in _find_biased(model):
        router.expert_bias.copy_(torch.tensor(state["biases"][name]))


def _find_biased(model: nn.Module) -> Iterator[tuple[str, BiasedTopKRouter]]:
    for name, module in model.named_modules():
        if isinstance(module, BiasedTopKRouter):
            yield name, module
