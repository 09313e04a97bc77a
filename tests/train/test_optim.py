"""Master weights, schedules, clipping."""

import copy

import pytest
import torch

from tests.tiny import make_model, make_tokens
from tramontane.errors import ConfigError, TrainingError
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
        for model in (ours, plain):
            add_gradients(model, seed=step)
        optimizer.accumulate()
        optimizer.step(1e-2)
        oracle.step()
        oracle.zero_grad()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)  # steps of 1e-2


def test_muon_equals_torch_muon_per_expert() -> None:
    """torch's Muon takes matrices alone; ours gives it each expert's, and AdamW the rest."""
    ours, plain = make_model(), make_model()
    optimizer = MasterOptimizer(ours, OptimizerConfig(kind="muon", lr=1e-2, max_grad_norm=1e9))
    names = ("layers.0.feed_forward.experts.w2", "layers.1.attention.wk.weight")
    expected = {name: dict(plain.named_parameters())[name].detach().clone() for name in names}
    stacks = [expected[names[0]][e].clone() for e in range(8)]
    matrices = [*stacks, expected[names[1]]]
    oracle = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    head = plain.output.weight.detach().clone()
    adamw = torch.optim.AdamW([head], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(3):
        ours.zero_grad()
        add_gradients(ours, seed=step)
        gradients = {name: p.grad.clone() for name, p in ours.named_parameters()}
        for e, matrix in enumerate(stacks):
            matrix.grad = gradients[names[0]][e]
        expected[names[1]].grad = gradients[names[1]]
        head.grad = gradients["output.weight"]
        oracle.step()
        adamw.step()
        optimizer.accumulate()
        optimizer.step(1e-2)
    torch.testing.assert_close(optimizer.masters[names[0]], torch.stack(stacks))
    torch.testing.assert_close(optimizer.masters[names[1]], expected[names[1]])
    torch.testing.assert_close(optimizer.masters["output.weight"], head, atol=2e-5, rtol=1e-5)


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
