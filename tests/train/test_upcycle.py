"""T08: an upcycled model starts as the function that the dense one is."""

from typing import Any

import pytest
import torch

from tests.bounds import measure_error
from tests.tiny import make_config, make_model
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.config import ModelConfig
from tramontane.errors import ConfigError
from tramontane.models.transformer import Transformer, build_model
from tramontane.train.upcycle import (
    UpcycledParameters,
    UpcycleOptions,
    compute_layered_logits,
    list_layers,
    make_prompts,
    plan_upcycled,
)

DENSE = make_config(moe=None, n_layers=4)


def upcycle(dense: Transformer, **options: Any) -> Transformer:
    """The whole model in memory."""
    chosen = UpcycleOptions(**options)
    config = plan_upcycled(dense.config, chosen)
    made = UpcycledParameters(ParametersInMemory(dense.state_dict()), dense.config, chosen)
    model = build_model(config)
    model.load_state_dict({name: made.read(name) for name in model.state_dict()})
    return model.eval()


def compute_logits(model: Transformer) -> torch.Tensor:
    prompts = make_prompts(model.config.vocab_size)
    with torch.no_grad():
        hidden = model.forward_packed(torch.cat(prompts), [len(p) for p in prompts]).hidden
        return model.compute_logits(hidden)


EXACT: list[dict[str, Any]] = [
    {},
    {"router_init": "zeros"},
    {"router_init": "uniform", "seed": 5},
    {"num_experts": 5, "num_experts_per_tok": 3},
    {"num_experts": 4, "num_experts_per_tok": 1},
    {"virtual_groups": 2},
    {"virtual_groups": 2, "router_init": "zeros", "num_experts": 4},
    {"virtual_groups": 3, "num_experts": 6, "num_experts_per_tok": 3},
    {"layers": "every-2"},
    {"layers": "0,2-3", "router_init": "zeros", "num_experts_per_tok": 3},
    {"virtual_groups": 4, "num_experts": 16, "num_experts_per_tok": 8, "router_init": "uniform"},
]


@pytest.mark.parametrize("options", EXACT, ids=str)
@pytest.mark.parametrize("kernels", ["native", "fused", "reference"])
def test_t08_the_start_is_the_dense_function(
    options: dict[str, Any], kernels: str, choose_kernels: Any
) -> None:
    """Within 1e-6 of the largest logit in fp32, the rounding of sums in another order."""
    choose_kernels(kernels)
    dense = make_model(DENSE)
    assert measure_error(compute_logits(upcycle(dense, **options)), compute_logits(dense)) <= 1e-6


def test_t08_whatever_the_router() -> None:
    """Also one that training has made sharp."""
    dense = make_model(DENSE)
    sparse = upcycle(dense)
    for seed, layer in enumerate(sparse.layers):
        generator = torch.Generator().manual_seed(seed)
        layer.feed_forward.gate.weight.data.normal_(0.0, 2.0, generator=generator)
    assert measure_error(compute_logits(sparse), compute_logits(dense)) <= 1e-6


def test_shards_of_other_networks_are_another_function() -> None:
    """Why a token takes all shards of a network: with rows of their own the start is not exact."""
    dense = make_model(DENSE)
    sparse = upcycle(dense, virtual_groups=2)
    for layer in sparse.layers:
        layer.feed_forward.gate.weight.data.normal_(0.0, 0.02)
    assert measure_error(compute_logits(sparse), compute_logits(dense)) > 0.01


def test_layers_that_are_not_chosen_stay_dense() -> None:
    dense = make_model(DENSE)
    sparse = upcycle(dense, layers="every-2", noise=0.1)
    assert sparse.config.moe is not None
    assert sparse.config.moe.layer_experts == (1, 8, 1, 8)
    kept, copied = (sparse.layers[n].feed_forward.experts.w1 for n in (2, 3))
    assert torch.equal(kept[0], dense.layers[2].feed_forward.w1.weight)
    assert (len(kept), len(copied)) == (1, 8)
    assert not torch.equal(copied[0], dense.layers[3].feed_forward.w1.weight)
    count = sparse.config.count_parameters()
    assert count.total == sum(p.numel() for p in sparse.parameters())
    network = 3 * DENSE.dim * DENSE.hidden_dim
    gates = DENSE.dim * (1 + 8 + 1 + 8)
    assert count.active == DENSE.count_parameters().total + 2 * network + gates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]), ("every-1", [0, 1, 2, 3, 4, 5]), ("every-2", [1, 3, 5]),
        ("every-4", [3]), ("last-2", [4, 5]), ("last-6", [0, 1, 2, 3, 4, 5]), ("3", [3]),
        ("4-5, 0,4", [0, 4, 5]),
    ],
)  # fmt: skip
def test_layers_are_named_by_a_rule_or_by_number(text: str, expected: list[int]) -> None:
    assert list_layers(text, 6) == expected


@pytest.mark.parametrize(
    "text", ["", "some", "every-0", "last-0", "every-7", "last-7", "6", "2-6", "5-4", "-1", "1,,2"]
)
def test_layers_that_there_are_not_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=f"layers is {text!r}"):
        list_layers(text, 6)


def test_noise_moves_each_copy_by_its_share() -> None:
    dense = make_model(DENSE)
    stack = upcycle(dense, noise=0.1).layers[1].feed_forward.experts.w1.data
    copied = dense.layers[1].feed_forward.w1.weight.data
    moved = (stack - copied).pow(2).mean((1, 2)).sqrt() / copied.pow(2).mean().sqrt()
    torch.testing.assert_close(moved, torch.full((8,), 0.1), rtol=0.05, atol=0)
    assert not torch.equal(stack[0], stack[1])


def test_the_seed_decides_the_router_and_nothing_else() -> None:
    dense = make_model(DENSE)
    torch.manual_seed(1)
    first = upcycle(dense, seed=1).state_dict()
    torch.manual_seed(2)
    again, other = upcycle(dense, seed=1).state_dict(), upcycle(dense, seed=2).state_dict()
    differing = [name for name in first if not torch.equal(first[name], other[name])]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert differing == [f"layers.{i}.feed_forward.gate.weight" for i in range(4)]
    gates = torch.cat([first[name] for name in differing])
    assert gates.std().item() == pytest.approx(0.02, rel=0.1)
    assert len(gates.unique(dim=0)) == len(gates)


def test_logits_layer_by_layer_are_those_of_the_model() -> None:
    for config in (DENSE, make_config(tie_embeddings=True), make_config(sliding_window=8)):
        model = make_model(config)
        layered = compute_layered_logits(
            ParametersInMemory(model.state_dict()), config, make_prompts(config.vocab_size)
        )
        torch.testing.assert_close(layered, compute_logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"virtual_groups": 2, "num_experts_per_tok": 1}, "num_experts_per_tok is 1, no multiple"),
        ({"virtual_groups": 3, "num_experts_per_tok": 3}, "num_experts is 8, no multiple of virt"),
        ({"virtual_groups": 5, "num_experts": 5, "num_experts_per_tok": 5}, "hidden_dim is 96"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"router_init": "ones"}, "router_init is 'ones'"),
        ({"num_experts_per_tok": 9}, "only 8 experts"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"layers": "last-2", "virtual_groups": 2}, "leave one of them out"),
    ],
)
def test_what_cannot_be_is_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_upcycled(DENSE, UpcycleOptions(**options))


def test_a_mixture_is_not_upcycled_again() -> None:
    config: ModelConfig = make_config()
    with pytest.raises(ConfigError, match="a mixture of 8 experts already"):
        plan_upcycled(config, UpcycleOptions())
