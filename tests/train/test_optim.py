"""Master weights, schedules, clipping."""

import copy

import pytest
import torch

from tests.tiny import make_model, make_tokens
from tramontane.errors import ConfigError, TrainingError
from tramontane.train.muon import orthogonalize
from tramontane.train.optim import MasterOptimizer, OptimizerConfig, compute_lr


def add_gradients(model: torch.nn.Module, *, seed: int) -> None:
    tokens = make_tokens(16, seed=seed)
    model.compute_logits(model.forward_packed(tokens, (16,)).hidden).pow(2).mean().backward()


def test_equals_torch_adamw_in_fp32() -> None:
    ours, plain = make_model(), make_model()
    config = OptimizerConfig(lr=1e-2, max_grad_norm=1e9)
    optimizer = MasterOptimizer(ours, config)
    decayed = [p for p in plain.parameters() if p.dim() > 1]
    others = [p for p in plain.parameters() if p.dim() == 1]
    oracle = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95),
    )  # fmt: skip
    for step in range(3):
        add_gradients(ours, seed=step)
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            theirs.grad = mine.grad  # the same bits: AdamW makes much of a tiny difference
        optimizer.accumulate()
        optimizer.step(1e-2)
        oracle.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)  # steps of 1e-2


def test_muon_equals_torch_muon_per_expert() -> None:
    """torch's Muon takes matrices alone, in bf16; ours takes stacks. AdamW updates the rest."""
    ours = make_model()
    optimizer = MasterOptimizer(ours, OptimizerConfig(kind="muon", lr=1e-2, max_grad_norm=1e9))
    ours.to(torch.bfloat16)
    stacked, single = "layers.0.feed_forward.experts.w2", "layers.1.attention.wk.weight"
    stack, matrix, head = (
        optimizer.masters[name].detach().clone() for name in (stacked, single, "output.weight")
    )
    matrices = [*stack.unbind(0), matrix]
    oracle = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([head], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    before = stack.clone()
    for step in range(3):
        add_gradients(ours, seed=step)
        gradients = {name: p.grad.float() for name, p in ours.named_parameters()}
        for view, grad in zip(matrices, [*gradients[stacked], gradients[single]], strict=True):
            view.grad = grad
        head.grad = gradients["output.weight"]
        oracle.step()
        adamw.step()
        optimizer.accumulate()
        optimizer.step(1e-2)
    assert (stack - before).abs().mean() > 1e-3  # against a tolerance for products in bf16:
    torch.testing.assert_close(optimizer.masters[stacked], stack, atol=1e-4, rtol=0)
    torch.testing.assert_close(optimizer.masters[single], matrix, atol=1e-4, rtol=0)
    torch.testing.assert_close(optimizer.masters["output.weight"], head, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 24, 64), (3, 64, 24), (32, 32)])
def test_orthogonalized_matrices(shape: tuple[int, ...]) -> None:
    """Singular values near one, singular vectors as they were."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    diagonal = left.mT @ orthogonalize(matrices) @ right.mT
    found = diagonal.diagonal(dim1=-2, dim2=-1)
    assert (found[values > 0.1] > 0.6).all()
    assert (found < 1.3).all()
    assert (diagonal - torch.diag_embed(found)).abs().max() < 1e-4


def test_small_updates_survive_in_bf16() -> None:
    """An update below bf16's resolution is lost in the weight, but not in its master."""
    model = make_model().to(torch.bfloat16)
    optimizer = MasterOptimizer(model, OptimizerConfig(weight_decay=0.0))
    before = optimizer.masters["output.weight"].clone()
    for _ in range(4):
        add_gradients(model, seed=0)
        optimizer.accumulate()
        optimizer.step(1e-6)
    moved = (optimizer.masters["output.weight"] - before).abs()
    assert moved.max() > 1e-6
    assert torch.equal(model.output.weight, optimizer.masters["output.weight"].bfloat16())


def test_gradients_of_several_batches_add_up_in_fp32() -> None:
    model = make_model()
    optimizer = MasterOptimizer(model, OptimizerConfig(max_grad_norm=1e9))
    reference = copy.deepcopy(model)
    for seed in range(3):
        add_gradients(model, seed=seed)
        optimizer.accumulate()
        add_gradients(reference, seed=seed)
    optimizer.average(2, step=1)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(optimizer.masters[name].grad, parameter.grad * 0.5)


def test_clipping_returns_the_norm_before() -> None:
    model = make_model()
    optimizer = MasterOptimizer(model, OptimizerConfig(max_grad_norm=1e-3))
    add_gradients(model, seed=0)
    optimizer.accumulate()
    before = optimizer.average(1, step=1)
    assert before > 1e-3
    assert optimizer.average(1, step=1) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named(value: float) -> None:
    """T04."""
    model = make_model()
    optimizer = MasterOptimizer(model, OptimizerConfig())
    add_gradients(model, seed=0)
    model.layers[1].attention.wk.weight.grad[0, 0] = value
    optimizer.accumulate()
    with pytest.raises(TrainingError, match=r"step 7: .*layers\.1\.attention\.wk\.weight"):
        optimizer.average(1, step=7)
    assert all(master.grad is None for master in optimizer.masters.values())


def test_schedules() -> None:
    cosine = OptimizerConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [compute_lr(step, num_steps=110, config=cosine) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[109] == pytest.approx(0.1, abs=1e-3)
    wsd = OptimizerConfig(
        lr=1.0, warmup_steps=10, schedule="wsd", min_lr_ratio=0.0, decay_ratio=0.2
    )
    rates = [compute_lr(step, num_steps=100, config=wsd) for step in range(101)]
    assert rates[10] == rates[79] == 1.0
    assert rates[90] == pytest.approx(0.5)
    assert rates[100] == 0.0


@pytest.mark.parametrize(
    "changes", [{"lr": 0.0}, {"schedule": "linear"}, {"decay_ratio": 2.0}, {"kind": "sgd"}]
)
def test_bad_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        OptimizerConfig(**changes)
