"""Load, entropy, and the alarms of a router that has collapsed (T24)."""

import pytest
import torch

from tramontane.kernels.reference import top_k_routing
from tramontane.nn.router import Routing
from tramontane.train.router_health import RouterHealth


def route(logits: torch.Tensor) -> Routing:
    return Routing(*top_k_routing(logits, 2), logits)


def test_balanced_routing_raises_no_alarm() -> None:
    health = RouterHealth()
    logits = 5.0 * torch.eye(8) + 5.0 * torch.eye(8).roll(1, 1)
    health.add([route(logits), route(logits)])
    assert [layer.entropy for layer in health.layers()] == pytest.approx([1.0, 1.0])
    assert health.find_alarms() == []


def test_a_collapsed_layer_is_named() -> None:
    health = RouterHealth()
    balanced = 5.0 * torch.eye(8) + 5.0 * torch.eye(8).roll(1, 1)
    collapsed = torch.zeros(8, 8)
    collapsed[:, 2:4] = 9.0
    health.add([route(balanced), route(collapsed)])
    first, second = health.layers()
    assert first.dead_experts == []
    assert second.shares == (0, 0, 0.5, 0.5, 0, 0, 0, 0)
    assert second.entropy == pytest.approx(1 / 3)
    assert all(alarm.startswith("layer 1:") for alarm in health.find_alarms())
    assert any("[0, 1, 4, 5, 6, 7] get no tokens" in alarm for alarm in health.find_alarms())


def test_batches_add_up_and_dense_models_have_no_load() -> None:
    health = RouterHealth()
    for chosen in (0, 2):
        logits = torch.zeros(3, 4)
        logits[:, chosen : chosen + 2] = 1.0
        health.add([route(logits)])
    assert health.layers()[0].shares == (0.25,) * 4
    dense = RouterHealth()
    dense.add(())
    assert dense.layers() == []
