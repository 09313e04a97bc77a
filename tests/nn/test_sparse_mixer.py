"""SparseMixer's estimate of the router's gradient against the exact one, by enumeration."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeMultiplier, PhimoeTopKRouter

from tests.tiny import make_config
from tramontane.config import MoeConfig
from tramontane.nn.routers.sparse_mixer import (
    SparseMixerRouter,
    SparseMixerV2Router,
    mask_far_experts,
)

E, D = 4, 6
Loss = Callable[[Tensor], Tensor]


def make_router(version: int, *, num_experts: int = E, eps: float = 0.1) -> SparseMixerRouter:
    name, kind = [("sparse_mixer", SparseMixerRouter), ("sparse_mixer_v2", SparseMixerV2Router)][
        version - 1
    ]
    moe = MoeConfig(num_experts, version, router=name)
    router = kind(make_config(), moe).double()
    router.eps = eps
    torch.nn.init.normal_(router.weight, std=0.2, generator=torch.Generator().manual_seed(5))
    return router


def draw_problem(seed: int) -> tuple[Tensor, Tensor, Loss]:
    """Logits (E,) near one another, what the experts say (E, D), and a smooth loss of the sum."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    outputs, head = 2 * draw(E, D), draw(5, D)
    logits = 2 + 0.1 * draw(E)

    def loss(y: Tensor) -> Tensor:
        return torch.logsumexp(head @ y, 0) - (head @ y)[0]

    return logits, outputs, loss


def differentiate(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    function(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


def enumerate_estimate(
    router: SparseMixerRouter, logits: Tensor, outputs: Tensor, loss: Loss
) -> Tensor:
    """The expectation of the router's gradient: over experts drawn, and whole or a part of one."""
    gates = torch.softmax(logits, -1)
    total = torch.zeros_like(logits)
    for expert in range(E):
        is_likeliest = expert == int(gates.argmax())
        for is_whole, share in ((True, router.whole_share), (False, 1 - router.whole_share)):
            if is_likeliest:
                is_whole, share = True, share  # it always runs whole

            def run(leaf: Tensor, expert: int = expert, whole: bool = is_whole) -> Tensor:
                masked = mask_far_experts(leaf[None], leaf[None], router.eps)
                gate = torch.softmax(masked, -1)[:, expert : expert + 1]
                weight = router.weigh(gate, torch.tensor([[whole]]))
                return loss(weight[0, 0] * outputs[expert])

            total += gates[expert] * share * differentiate(run, logits)
    return total


def enumerate_first_order(logits: Tensor, outputs: Tensor, loss: Loss, *, gain: float) -> Tensor:
    """`gain` times the plain gradient of the weight, in expectation over the expert drawn."""
    gates = torch.softmax(logits, -1)

    def run(leaf: Tensor) -> Tensor:
        weights = torch.softmax(leaf, -1)
        terms = [gates[e] * loss(weights[e] * outputs[e]) for e in range(E)]
        return gain * torch.stack(terms).sum()

    return differentiate(run, logits)


def compute_exact(logits: Tensor, outputs: Tensor, loss: Loss, *, with_weight: bool) -> Tensor:
    """d/d logits of sum_e p_e loss(p_e f_e), through the draw, and the weight if `with_weight`."""

    def run(leaf: Tensor) -> Tensor:
        gates = torch.softmax(leaf, -1)
        weights = gates if with_weight else gates.detach()
        return sum(gates[e] * loss(weights[e] * outputs[e]) for e in range(E))

    return differentiate(run, logits)


def measure_bias(version: int, *, num_problems: int = 30) -> tuple[float, float, float]:
    """Mean squared distance from the exact gradient: of the estimate, of the plain gradient of a
    drawn expert's weight, and of that of the likeliest expert, which Switch uses.
    """
    router = make_router(version)
    sums = torch.zeros(3, dtype=torch.float64)
    for seed in range(num_problems):
        logits, outputs, loss = draw_problem(seed)
        exact = compute_exact(logits, outputs, loss, with_weight=version == 1)
        best = int(logits.argmax())

        def run_likeliest(
            leaf: Tensor, best: int = best, outputs: Tensor = outputs, loss: Loss = loss
        ) -> Tensor:
            return loss(torch.softmax(leaf, -1)[best] * outputs[best])

        estimates = (
            enumerate_estimate(router, logits, outputs, loss),
            enumerate_first_order(logits, outputs, loss, gain=1.0),
            differentiate(run_likeliest, logits),
        )
        sums += torch.stack([(estimate - exact).square().sum() for estimate in estimates])
    ours, drawn, likeliest = (sums / num_problems).tolist()
    return ours, drawn, likeliest


def test_bias_of_the_first_version_is_smaller_than_that_of_plain_gradients() -> None:
    """The plain gradient of a weight knows nothing of the draw; here it is a fifteenth of that."""
    ours, drawn, likeliest = measure_bias(1)
    assert ours < 0.2 * drawn
    assert ours < 0.05 * likeliest


def test_bias_of_the_second_version_is_smaller_than_that_of_top_1() -> None:
    """It estimates the gradient of the draw alone, the weight counting as fixed."""
    ours, _, likeliest = measure_bias(2)
    assert ours < 0.05 * likeliest


@pytest.mark.parametrize(("version", "degree"), [(1, 2), (2, 3)])
def test_the_rule_is_exact_for_polynomials_of_its_order(version: int, degree: int) -> None:
    """Of an expert that is not the likeliest: the midpoint rule to degree 2, Heun's to degree 3."""
    router = make_router(version)
    for power in range(1, degree + 2):
        gate = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)
        slope = torch.zeros(1, 1, dtype=torch.float64)
        for is_whole, share in ((True, router.whole_share), (False, 1 - router.whole_share)):
            loss = (2 * router.weigh(gate, torch.tensor([[is_whole]]))) ** power
            slope += share * torch.autograd.grad(loss.sum(), gate)[0] * gate.detach()
        exact = (2 * 0.3) ** power  # what the draw changes: the loss with the expert, less without
        if version == 1:  # and d/dp of the weight: p * loss(2 p) has both
            exact *= 1 + power
        assert (abs(slope.item() - exact) < 1e-12) == (power <= degree)


@pytest.mark.parametrize("version", [1, 2])
def test_experts_are_drawn_by_their_probability(version: int) -> None:
    router = make_router(version).train()
    x = torch.randn(1, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    router.eps = 10.0  # nothing is too far
    routing = router(x.expand(20_000, -1))
    gates = torch.softmax(routing.logits[0], -1)
    found = torch.bincount(routing.experts[:, 0], minlength=E) / 20_000
    assert ((found - gates).abs() < 4 * (gates * (1 - gates) / 20_000).sqrt()).all()
    if version == 2:  # the second among the others
        others = routing.experts[routing.experts[:, 0] == 0, 1]
        left = torch.softmax(routing.logits[0, 1:], -1)
        found = torch.bincount(others, minlength=E)[1:] / len(others)
        assert ((found - left).abs() < 4 * (left * (1 - left) / len(others)).sqrt()).all()


@pytest.mark.parametrize("version", [1, 2])
def test_the_mean_of_draws_is_the_enumerated_estimate(version: int) -> None:
    """The router itself, 40,000 times: the gradient of its first slot."""
    router = make_router(version).train()
    logits, outputs, loss = draw_problem(3)
    leaf = logits.clone().requires_grad_()
    num_draws = 40_000
    weights, experts = router._choose(*(2 * [leaf.expand(num_draws, -1)]))
    losses = torch.stack([torch.func.vmap(loss)(weights * outputs[e]) for e in range(E)], 1)
    losses.gather(1, experts).mean().backward()
    expected = enumerate_estimate(router, logits, outputs, loss)
    torch.testing.assert_close(leaf.grad, expected, rtol=0, atol=0.02)


def test_experts_that_are_too_far_are_never_drawn() -> None:
    logits = torch.tensor([[1.0, 0.85, 0.75, -3.0], [-1.0, -1.1, -1.3, -9.0]])
    masked = mask_far_experts(logits, logits, 0.1)
    assert masked.isinf().tolist() == [[False, False, True, True], [False, False, True, True]]


@torch.no_grad()
@pytest.mark.parametrize("eps", [0.01, 0.1, 2.0])
def test_second_version_equals_transformers_outside_of_training(eps: float) -> None:
    """PhiMoE's router."""
    router = make_router(2, num_experts=8, eps=eps).float().eval()
    config = PhimoeConfig(hidden_size=64, num_local_experts=8, router_jitter_noise=eps)
    oracle = PhimoeTopKRouter(config).eval()
    oracle.weight.copy_(router.weight)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    logits, weights, experts = oracle(x)
    routing = router(x)
    assert torch.equal(routing.experts, experts)
    torch.testing.assert_close(routing.weights, weights)
    torch.testing.assert_close(routing.logits, logits)


@pytest.mark.parametrize("is_whole", [True, False])
def test_gradient_of_the_second_version_equals_transformers(is_whole: bool) -> None:
    """PhiMoE's backward pass, of an expert that was drawn and how."""
    scores, outputs, loss = draw_problem(1)
    drawn = torch.tensor([[2]])
    theirs, ours = (scores[None].clone().requires_grad_() for _ in "ab")
    gates = torch.softmax(theirs, -1)
    scale = torch.tensor([[1.0 if is_whole else 0.3333]], dtype=torch.float64)
    weight = PhimoeMultiplier.apply(theirs, gates.gather(1, drawn), drawn, gates, scale)
    loss(weight[0, 0] * outputs[2]).backward()
    router = make_router(2)
    gate = torch.softmax(ours, -1).gather(1, drawn)
    loss(router.weigh(gate, torch.tensor([[is_whole]]))[0, 0] * outputs[2]).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)  # 0.3333 for 1/3


def test_omega_scales_the_sum() -> None:
    router = make_router(1)
    y = torch.randn(3, 64, dtype=torch.float64)
    assert torch.equal(router.finish(y), y)
    torch.nn.init.constant_(router.omega, 0.5)
    assert torch.equal(router.finish(y), 0.5 * y)
    assert "omega" not in dict(make_router(2).named_parameters())
