"""The routers beside Mixtral's: oracles, capacity, chance, and gradients."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

from tests.tiny import make_config
from tramontane.config import ModelConfig, MoeConfig
from tramontane.config.moe import ROUTERS
from tramontane.errors import ConfigError
from tramontane.kernels.reference import top_k_routing
from tramontane.nn.draws import read_draws, restore_draws, seed_draws
from tramontane.nn.router import Router, Routing
from tramontane.nn.routers.build import build_router
from tramontane.nn.routers.capacity import compute_capacity, limit_to_capacity

NAMES = [name for name in ROUTERS if name != "soft"]


def make_moe(name: str, **options: Any) -> MoeConfig:
    kind = ROUTERS[name]
    moe = MoeConfig(8, kind.experts_per_tok or 2, router=name)
    return replace(moe, router_options=replace(moe.options, **options))


def make_router(name: str, *, scale: float = 0.5, **options: Any) -> Router:
    router = build_router(make_config(), make_moe(name, **options), causal=False)
    for parameter in router.parameters():
        if parameter.dim() > 1:
            generator = torch.Generator().manual_seed(7)
            torch.nn.init.normal_(parameter, std=scale * 0.125, generator=generator)
    return router


def draw_hidden(num_tokens: int, *, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 50])
@pytest.mark.parametrize("name", NAMES)
def test_every_router_keeps_to_the_seam(name: str, num_tokens: int, is_training: bool) -> None:
    router = make_router(name).train(is_training)
    weights, experts, logits, chosen = router(draw_hidden(num_tokens))
    assert weights.dtype == logits.dtype == torch.float32
    assert experts.dtype == torch.int64
    assert weights.shape == experts.shape
    assert logits.shape == (num_tokens, 8)
    assert ((experts >= -1) & (experts < 8)).all()
    assert (weights[experts == -1] == 0).all()
    assert chosen is None or chosen.shape == experts.shape
    for row in experts.tolist():
        used = [expert for expert in row if expert >= 0]
        assert len(used) == len(set(used))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_outside_of_training_nothing_is_drawn(name: str) -> None:
    router = make_router(name).eval()
    first, second = router(draw_hidden(40)), router(draw_hidden(40))
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.experts, second.experts)
    assert router.draws is None or router.draws.count == 0


@pytest.mark.parametrize("name", [n for n in NAMES if make_router(n).is_random])
def test_draws_go_on_where_they_were(name: str) -> None:
    """T01: after a resumption a router draws what it would have drawn."""
    model = torch.nn.ModuleDict(
        {"gate": make_router(name, scale=2.0 if name == "st_moe" else 0.1)}
    ).train()
    gate, x = model["gate"], draw_hidden(200)
    seed_draws(model, 3)
    gate(x)
    state = read_draws(model)
    second, third = gate(x), gate(x)
    assert not torch.equal(second.weights, third.weights)
    restore_draws(model, state)
    torch.randn(5)  # what else draws does not matter
    again = gate(x)
    assert torch.equal(again.weights, second.weights)
    assert torch.equal(again.experts, second.experts)
    seed_draws(model, 4)
    gate(x)
    assert not torch.equal(gate(x).weights, second.weights)


def test_layers_do_not_share_their_noise() -> None:
    routers = [build_router(make_config(), make_moe("noisy_top_k"), layer=i) for i in (0, 1)]
    routers[1].load_state_dict(routers[0].state_dict())
    first, second = (router.train()(draw_hidden(50)) for router in routers)
    assert not torch.equal(first.logits, second.logits)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [1, 4, 7, 50])
def test_switch_equals_transformers(capacity: int) -> None:
    """S-12: SwitchTransformers' router, tokens over capacity dropped in the order of positions."""
    router = make_router("switch", jitter=0.0, capacity_factor=capacity * 8 / 50).train()
    config = SwitchTransformersConfig(
        hidden_size=64, num_experts=8, expert_capacity=capacity, router_jitter_noise=0.0
    )
    oracle = SwitchTransformersTop1Router(config)
    oracle.classifier.weight.copy_(router.weight)
    x = draw_hidden(50)
    dispatch, weights, logits = oracle(x)
    routing = router(x)
    kept = dispatch.sum(-1) > 0
    assert torch.equal(routing.experts[:, 0] >= 0, kept)
    assert torch.equal(routing.experts[kept, 0], dispatch[kept].argmax(-1))
    torch.testing.assert_close(routing.weights[kept], weights[kept])
    torch.testing.assert_close(routing.logits, logits)
    assert routing.chosen is not None
    assert torch.equal(routing.chosen[:, 0], logits.argmax(-1))


@pytest.mark.parametrize(("factor", "num_tokens"), [(1.0, 64), (1.25, 64), (2.0, 30), (0.5, 7)])
def test_drops_of_a_forced_load_follow_the_closed_form(factor: float, num_tokens: int) -> None:
    """S-12: where all tokens want one expert, 1 - ceil(factor T / E) / T of them are dropped."""
    experts = torch.full((num_tokens, 1), 5)
    routing = Routing(torch.ones(num_tokens, 1), experts, torch.zeros(num_tokens, 8))
    limited = limit_to_capacity(routing, factor)
    kept = math.ceil(factor * num_tokens / 8)
    assert (limited.experts[:, 0] >= 0).tolist() == [True] * kept + [False] * (num_tokens - kept)
    assert limited.weights.sum() == kept


def test_capacity_of_as_many_as_there_are_experts_drops_nothing() -> None:
    """S-12."""
    x = draw_hidden(33)
    full = make_router("switch", jitter=0.0, capacity_factor=8.0).train()(x)
    dropless = make_router("switch", jitter=0.0, capacity_factor=0.0).train()(x)
    assert torch.equal(full.experts, dropless.experts)
    assert torch.equal(full.weights, dropless.weights)
    assert dropless.chosen is None


def test_first_choices_come_before_second_ones() -> None:
    """GShard's order: token 0's second choice waits for token 3's first."""
    experts = torch.tensor([[1, 0], [2, 0], [3, 0], [0, 1]])
    routing = Routing(torch.full((4, 2), 0.5), experts, torch.zeros(4, 4))
    assert compute_capacity(4, 4, 2.0) == 2
    assert limit_to_capacity(routing, 2.0).experts.tolist() == [[1, 0], [2, -1], [3, -1], [0, 1]]


def test_a_single_token_is_never_dropped() -> None:
    assert make_router("switch").train()(draw_hidden(1)).experts.item() >= 0


@torch.no_grad()
@pytest.mark.parametrize(("name", "threshold"), [("gshard", 0.5), ("st_moe", 0.2)])
def test_second_experts_are_taken_as_often_as_their_weight_says(
    name: str, threshold: float
) -> None:
    """S-13, S-14: with probability min(1, weight / threshold); ST-MoE's threshold is 0.2."""
    router = make_router(name, capacity_factor=0.0).train()
    assert router.options.threshold == threshold
    x = draw_hidden(30)
    weights = top_k_routing(router.score(x), 2)[0][:, 1]  # (30,)
    expected = (weights / threshold).clamp(max=1)
    taken = (router(x.repeat(400, 1)).experts[:, 1] >= 0).float().view(400, 30).mean(0)
    deviation = (expected * (1 - expected) / 400).sqrt()
    assert ((taken - expected).abs() <= 4 * deviation + 1e-6).all()
    eval_taken = router.eval()(x).experts[:, 1] >= 0
    assert torch.equal(eval_taken, expected >= 0.5)


@torch.no_grad()
def test_noise_has_the_learnt_deviation_in_training_and_is_off_in_evaluation() -> None:
    """S-13."""
    router = make_router("noisy_top_k").train()
    x = draw_hidden(6)
    clean = router.score(x)
    noise = router(x.repeat(2000, 1)).logits.view(2000, 6, 8) - clean
    deviation = torch.nn.functional.softplus(x @ router.noise_weight.t())
    assert (noise.mean(0).abs() < 4.5 * deviation / 2000**0.5).all()
    torch.testing.assert_close(noise.std(0), deviation, rtol=0.08, atol=0)
    plain = top_k_routing(clean, 2)
    routing = router.eval()(x)
    assert torch.equal(routing.weights, plain[0])
    assert torch.equal(routing.experts, plain[1])


@torch.no_grad()
def test_jitter_scales_the_input_of_the_gate_alone() -> None:
    router = make_router("switch", jitter=0.3).train()
    x = draw_hidden(4)
    ratio = router._jitter(torch.ones(1000, 64))
    assert ratio.min() >= 0.7
    assert ratio.max() <= 1.3
    assert ratio.mean().item() == pytest.approx(1.0, abs=0.01)
    before = x.clone()
    router(x)
    assert torch.equal(x, before)


@torch.no_grad()
@pytest.mark.parametrize("top_p", [0.1, 0.4, 0.7, 1.0])
def test_top_p_takes_the_fewest_experts_that_suffice(top_p: float) -> None:
    """S-40."""
    moe = MoeConfig(8, 8, router="top_p", router_options=ROUTERS["top_p"](top_p=top_p))
    router = build_router(make_config(), moe)
    router.weight.copy_(make_router("top_k").weight)
    routing = router(draw_hidden(60))
    probs = torch.softmax(routing.logits, -1).sort(-1, descending=True)
    for token in range(60):
        sums = probs.values[token].cumsum(0)
        fewest = next((n for n, total in enumerate(sums, start=1) if total >= top_p - 1e-6), 8)
        used = routing.experts[token] >= 0
        assert used.sum() == fewest
        assert torch.equal(routing.experts[token, :fewest], probs.indices[token, :fewest])
        torch.testing.assert_close(routing.weights[token, :fewest], probs.values[token, :fewest])


@torch.no_grad()
def test_a_bias_changes_the_choice_and_not_the_weights() -> None:
    router = make_router("biased_top_k")
    x = draw_hidden(30)
    plain = make_router("top_k")(x)
    assert torch.equal(router(x).experts, plain.experts)
    router.expert_bias[3] = 100.0
    routing = router(x)
    assert (routing.experts[:, 0] == 3).all()
    chosen = routing.logits.gather(1, routing.experts)
    torch.testing.assert_close(routing.weights, torch.softmax(chosen, -1))


@torch.no_grad()
def test_the_bias_moves_against_the_load() -> None:
    """arXiv:2408.15664, algorithm 1: by the sign of what an expert's load lacks of the mean."""
    router = make_router("biased_top_k")
    router.move_bias(torch.tensor([4, 0, 2, 2, 2, 2, 2, 2]), rate=1e-3)
    expected = torch.tensor([-1e-3, 1e-3, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(router.expert_bias, expected)


def test_the_bias_stays_fp32_in_a_bf16_model() -> None:
    router = make_router("biased_top_k")
    router.expert_bias.fill_(0.1004)
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert router.expert_bias.dtype == torch.float32
    assert router.expert_bias[0] == torch.tensor(0.1004)
    assert router(draw_hidden(3).bfloat16()).weights.dtype == torch.float32
    meta = build_router(make_config(), make_moe("biased_top_k")).to("meta")
    assert meta.to_empty(device="cpu").expert_bias.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 8.0])
def test_each_expert_chooses_its_likeliest_tokens(factor: float) -> None:
    router = make_router("expert_choice", capacity_factor=factor)
    routing = router(draw_hidden(40))
    probs = torch.softmax(routing.logits, -1)
    for expert in range(8):
        taken = set((routing.experts == expert).any(1).nonzero().flatten().tolist())
        assert taken == set(probs[:, expert].topk(math.ceil(factor * 5)).indices.tolist())
        torch.testing.assert_close(
            routing.weights[:, expert].sum(), probs[list(taken), expert].sum()
        )


@torch.no_grad()
def test_weights_of_expert_choice_may_be_normalised() -> None:
    routing = make_router("expert_choice", normalize=True)(draw_hidden(40))
    sums = routing.weights.sum(-1)
    is_seen = (routing.experts >= 0).any(1)
    torch.testing.assert_close(sums, is_seen.float())


@pytest.mark.parametrize("name", ["expert_choice", "soft"])
def test_what_looks_ahead_is_refused_in_a_causal_model(name: str) -> None:
    with pytest.raises(ConfigError, match=f"moe.router is '{name}', .* later"):
        make_config(moe=make_moe(name))
    with pytest.raises(ConfigError, match="causal"):
        build_router(make_config(), make_moe(name))


@torch.no_grad()
def test_expert_choice_does_look_ahead() -> None:
    """Why it is refused: a token that comes later takes the place of an earlier one."""
    router = make_router("expert_choice", capacity_factor=1.0)
    x = draw_hidden(8)
    first = router(x).experts[0]
    later = [router(torch.cat([x[:1], draw_hidden(7, seed=seed)])).experts[0] for seed in range(9)]
    assert any(not torch.equal(first, experts) for experts in later)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in NAMES if n != "expert_choice"])
def test_other_routers_do_not_outside_of_training(name: str) -> None:
    router = make_router(name).eval()
    x = draw_hidden(8)
    one = router(x[:1])
    for seed in range(5):
        whole = router(torch.cat([x[:1], draw_hidden(7, seed=seed)]))
        assert torch.equal(whole.experts[0], one.experts[0])


def test_soft_is_not_a_router() -> None:
    with pytest.raises(ConfigError, match="SoftMoe"):
        build_router(make_config(), make_moe("soft"), causal=False)


def test_models_count_what_their_routers_hold() -> None:
    config: ModelConfig = make_config(moe=make_moe("noisy_top_k"))
    more = config.count_parameters().total - make_config().count_parameters().total
    assert more == 2 * 8 * 64
