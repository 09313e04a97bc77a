"""Load, entropy, drops, and the alarms of a router that has collapsed (T24)."""

import pytest
import torch

from tramontane.kernels.reference import top_k_routing
from tramontane.nn.router import Routing
from tramontane.nn.routers.capacity import limit_to_capacity
from tramontane.train.router_health import (
    LayerLoad,
    RouterHealth,
    RouterWatch,
    describe_layers,
)

BALANCED = 5.0 * torch.eye(8) + 5.0 * torch.eye(8).roll(1, 1)


def route(logits: torch.Tensor) -> Routing:
    return Routing(*top_k_routing(logits, 2), logits)


def test_balanced_routing_raises_no_alarm() -> None:
    health, watch = RouterHealth(), RouterWatch(1)
    health.add([route(BALANCED), route(BALANCED)])
    for layer in health.layers():
        assert layer.entropy == pytest.approx(1.0)
        assert layer.max_over_mean == pytest.approx(1.0)
        assert layer.experts_per_token == 2.0
        assert layer.dropped == 0.0
    assert watch.observe(health.layers()) == []


def test_a_collapsed_layer_is_measured() -> None:
    health = RouterHealth()
    collapsed = torch.zeros(8, 8)
    collapsed[:, 2:4] = 9.0
    health.add([route(BALANCED), route(collapsed)])
    first, second = health.layers()
    assert first.dead_experts == []
    assert second.shares == (0, 0, 0.5, 0.5, 0, 0, 0, 0)
    assert second.entropy == pytest.approx(1 / 3)
    assert second.max_over_mean == 4.0
    assert second.dead_experts == [0, 1, 4, 5, 6, 7]
    line = describe_layers([first, second])
    assert line["dead"] == [0, 6]
    assert line["load"][1] == [0, 0, 0.5, 0.5, 0, 0, 0, 0]


def test_an_alarm_names_layer_and_expert_once_per_event() -> None:
    """T24."""
    watch = RouterWatch(3)
    well = LayerLoad((0.25,) * 4)
    dead = LayerLoad((0.3, 0.0, 0.3, 0.4))
    seen = [watch.observe([well, layer]) for layer in [dead] * 5 + [well] + [dead] * 4]
    alarm = ["layer 1: expert 1 has had no token for 3 steps"]
    assert seen == [[], [], alarm, [], [], [], [], [], alarm, []]


def test_a_collapse_is_said_even_if_no_expert_is_dead() -> None:
    watch = RouterWatch(2)
    uneven = LayerLoad((0.97, 0.01, 0.01, 0.01))
    assert watch.observe([uneven]) == []
    assert watch.observe([uneven]) == [
        "layer 0: the entropy of its load has been below 0.75 of an even one for 2 steps"
    ]
    assert watch.observe([uneven]) == []


def test_drops_and_unused_slots_are_counted() -> None:
    logits = torch.zeros(8, 4)
    logits[:, 1] = 5.0
    wanted = Routing(torch.ones(8, 1), torch.ones(8, 1, dtype=torch.int64), logits)
    health = RouterHealth()
    health.add([limit_to_capacity(wanted, 1.0)])
    (layer,) = health.layers()
    assert layer.shares == (0, 1, 0, 0)
    assert layer.dropped == 0.75
    assert layer.experts_per_token == 0.25
    adaptive = RouterHealth()
    adaptive.add([wanted._replace(experts=torch.tensor([[0, -1], [2, 3]]), logits=logits[:2])])
    assert adaptive.layers()[0].experts_per_token == 1.5
    assert adaptive.layers()[0].dropped == 0.0


def test_padding_is_no_load() -> None:
    """T05."""
    logits = torch.zeros(6, 4)
    logits[:3, 0], logits[3:, 2] = 5.0, 5.0
    mask = torch.tensor([True] * 3 + [False] * 3)
    health = RouterHealth()
    routing = Routing(*top_k_routing(logits, 1), logits)
    health.add([routing], mask=mask)
    assert health.layers()[0].shares == (1, 0, 0, 0)
    assert health.counts()[0].tolist() == [3, 0, 0, 0]
    nobody = RouterHealth()
    nobody.add([routing], mask=torch.zeros(6, dtype=torch.bool))
    assert nobody.layers() == []


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


def test_layers_may_have_different_numbers_of_experts() -> None:
    health = RouterHealth()
    health.add([route(torch.eye(4)), route(torch.eye(8))])
    assert [len(layer.shares) for layer in health.layers()] == [4, 8]
