"""The loop: exact resumption, accumulation, and values that are not finite."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from tests.train.trainers import CountingSource, assert_same_weights, make_trainer, read_log
from tramontane.config import MoeConfig
from tramontane.data.packing import PackedBatch
from tramontane.errors import ConfigError, TrainingError
from tramontane.models.transformer import Transformer
from tramontane.train.loop import LoopConfig, Trainer
from tramontane.train.losses import LossTerms, compute_next_token_loss


def test_loss_falls(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=30)
    assert trainer.run()
    losses = [report.loss for report in trainer.observer.reports]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_interrupted_and_resumed_run_equals_the_unbroken_one(
    tmp_path: Path, kind: Literal["adamw", "muon"]
) -> None:
    """T01: SIGTERM after step 3; in the end weights, moments, order of data and log agree."""
    whole = make_trainer(tmp_path / "whole", kind=kind)
    assert whole.run()
    interrupted = make_trainer(tmp_path / "parts", kind=kind)
    interrupted.observer.on_step = lambda report, num_steps: (
        os.kill(os.getpid(), signal.SIGTERM) if report.step == 3 else None
    )
    assert not interrupted.run()
    resumed = make_trainer(tmp_path / "parts", kind=kind)
    resumed.resume()
    assert resumed.step == 3
    assert resumed.run()
    assert_same_weights(resumed, whole)
    assert resumed.source.position == whole.source.position == 6
    assert [r["loss"] for r in read_log(resumed)] == [r["loss"] for r in read_log(whole)]


@dataclass
class MaskedSource(CountingSource):
    """Rows in which every third target of every other row does not count, as prompts do not."""

    def next_batch(self) -> PackedBatch:
        first = self.position * self.rows
        batch = super().next_batch()
        is_even = np.arange(first, first + self.rows) % 2 == 0
        hidden = (batch.tokens % 3 == 0) & np.repeat(is_even, batch.seqlens)
        return batch._replace(targets=np.where(hidden, -100, batch.targets))


@pytest.mark.parametrize("source", [CountingSource, MaskedSource])
@pytest.mark.parametrize("moe", [MoeConfig(), None])
def test_accumulated_batches_equal_one_large_batch(
    tmp_path: Path, source: type[CountingSource], moe: MoeConfig | None
) -> None:
    """T06: rows of unequal length and unequal share of targets, aux and z on: 1 x 8 and 8 x 1."""
    loop = {"load_balancing_coef": 0.5, "router_z_coef": 0.1, "save_every": 0}  # far above usual
    many = make_trainer(tmp_path / "many", steps=1, loop=loop | {"accumulation": 8}, moe=moe)
    one = make_trainer(tmp_path / "one", steps=1, loop=loop, moe=moe)
    many.source, one.source = source(rows=1), source(rows=8)
    for trainer in (many, one):
        trainer.optimizer.step = lambda lr: None  # keep the gradients
        trainer.run()
    for name, master in many.optimizer.masters.items():
        expected = one.optimizer.masters[name].grad
        torch.testing.assert_close(master.grad, expected, atol=1e-6, rtol=1e-5)
    (ours,), (theirs,) = many.observer.reports, one.observer.reports
    assert ours.num_units == theirs.num_units
    for name in ("loss", "load_balancing_loss", "router_z_loss", "grad_norm"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-6)


def test_batches_that_balance_for_themselves_are_another_loss(tmp_path: Path) -> None:
    """The cheaper way says what it is, and runs no batch twice."""
    reports = {}
    for choice in ("step", "batch"):
        loop = {"accumulation": 4, "save_every": 0, "balance_over": choice}
        trainer = make_trainer(tmp_path / choice, steps=1, loop=loop)
        calls = []
        trainer.compute_loss = lambda model, batch, calls=calls: (
            calls.append(1) or compute_next_token_loss(model, batch)
        )
        trainer.run()
        assert len(calls) == {"step": 8, "batch": 4}[choice]
        reports[choice] = trainer.observer.reports[0]
    assert reports["step"].loss == reports["batch"].loss
    assert reports["batch"].load_balancing_loss > reports["step"].load_balancing_loss + 1e-3
    with pytest.raises(ConfigError, match="balance_over is 'row'"):
        LoopConfig(balance_over="row")


def poison_loss(trainer: Trainer[Any], value: float) -> None:
    def compute(model: Transformer, batch: PackedBatch) -> LossTerms:
        terms = compute_next_token_loss(model, batch)
        return terms._replace(objective=terms.objective * value) if trainer.step == 4 else terms

    trainer.compute_loss = compute


def poison_activation(trainer: Trainer[Any], value: float) -> None:
    def spoil(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * value if trainer.step == 4 else output

    trainer.model.layers[1].attention.wv.register_forward_hook(spoil)


def poison_gradient(trainer: Trainer[Any], value: float) -> None:
    trainer.model.layers[1].attention.wk.weight.register_hook(
        lambda grad: grad * value if trainer.step == 4 else grad
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("poison", "named"),
    [
        (poison_loss, "the loss itself"),
        (poison_activation, r"the output of layers\.1\.attention\.wv"),
        (poison_gradient, r"the gradient of layers\.1\.attention\.wk\.weight"),
    ],
)
def test_what_is_not_finite_stops_before_the_step(
    tmp_path: Path, value: float, poison: Callable[[Trainer[Any], float], None], named: str
) -> None:
    """T04: the step is named, and the tensor; weights keep their bits, and nothing is saved."""
    trainer = make_trainer(tmp_path)
    poison(trainer, value)
    with pytest.raises(TrainingError, match=f"step 5: .*{named}"):
        trainer.run()
    assert [path.name for path in trainer.folder.find_checkpoints()] == ["step-2", "step-4"]
    healthy = make_trainer(tmp_path)
    healthy.resume()
    assert healthy.step == 4
    assert_same_weights(trainer, healthy)
    masters = trainer.optimizer.masters
    assert all(torch.equal(p, masters[name]) for name, p in trainer.model.named_parameters())
    assert all(master.grad is None for master in masters.values())


def test_a_bad_weight_is_named(tmp_path: Path) -> None:
    """T04: as a spike of the step before may leave it."""
    trainer = make_trainer(tmp_path)
    trainer.model.layers[0].feed_forward.experts.w2.data[3, 0, 0] = float("inf")
    trainer.model.layers[0].feed_forward.gate.weight.data[3] += 9.0
    with pytest.raises(TrainingError, match=r"finite is layers\.0\.feed_forward\.experts\.w2"):
        trainer.run()


def test_a_batch_without_targets_is_a_step_of_loss_zero(tmp_path: Path) -> None:
    """T23: all targets masked; nothing becomes NaN, and training goes on."""
    trainer = make_trainer(tmp_path, steps=3)

    def mask(model: Transformer, batch: PackedBatch) -> LossTerms:
        if trainer.step == 1:
            batch = batch._replace(targets=np.full_like(batch.targets, -100))
        return compute_next_token_loss(model, batch)

    trainer.compute_loss = mask
    assert trainer.run()
    assert [report.loss > 0 for report in trainer.observer.reports] == [True, False, True]
    assert trainer.observer.reports[1].loss == trainer.observer.reports[1].grad_norm == 0.0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_evaluation_and_samples_reach_log_and_observer(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        steps=4,
        loop={"eval_every": 3, "sample_every": 2},
        evaluate=lambda model: {"stories": 1.25},
        sample=lambda model: "Once",
    )
    trainer.run()
    records = read_log(trainer)
    assert [r["step"] for r in records if "held_out_bits_per_byte" in r] == [3, 4]
    assert [r["step"] for r in records if "sample" in r] == [2, 4]
    assert any("stories 1.250" in note for note in trainer.observer.notes)
