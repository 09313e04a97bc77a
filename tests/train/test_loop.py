"""The loop: exact resumption, accumulation, and what happens when something breaks."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from tests.tiny import make_config, make_model
from tramontane.config import MoeConfig
from tramontane.data.packing import PackedBatch
from tramontane.errors import CapacityError, CheckpointError, ConfigError, TrainingError
from tramontane.models.transformer import Transformer
from tramontane.train.checkpoint import RunFolder
from tramontane.train.loop import LoopConfig, StepReport, Trainer
from tramontane.train.losses import LossTerms, compute_next_token_loss
from tramontane.train.optim import MasterOptimizer, OptimizerConfig


@dataclass
class CountingSource:
    """Batch i is a function of i; `rows` of them can be put together into one."""

    rows: int = 1
    position: int = 0

    def next_batch(self) -> PackedBatch:
        rows = [self._row(self.position * self.rows + i) for i in range(self.rows)]
        self.position += 1
        tokens = np.concatenate(rows)
        lengths = tuple(len(row) for row in rows)
        return PackedBatch(tokens, (tokens + 1) % 128, lengths, ("a",) * self.rows)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    @staticmethod
    def _row(index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 128, 16 + index % 3)


@dataclass
class Recorder:
    reports: list[StepReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def on_step(self, report: StepReport, num_steps: int) -> None:
        self.reports.append(report)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def make_trainer(
    out: Path, *, steps: int = 6, rows: int = 1, kind: Literal["adamw", "muon"] = "adamw",
    **changes: Any,
) -> Trainer[Any]:  # fmt: skip
    made = make_model(make_config(moe=changes.pop("moe", MoeConfig())), seed=3)
    model, lr = changes.pop("model", made), changes.pop("lr", 1e-3)
    loop = {"num_steps": steps, "save_every": 2, "log_every": 1} | changes.pop("loop", {})
    return Trainer(
        model=model,
        optimizer=MasterOptimizer(model, OptimizerConfig(kind=kind, lr=lr, warmup_steps=2)),
        source=CountingSource(rows=rows),
        compute_loss=compute_next_token_loss,
        config=LoopConfig(**loop),
        folder=RunFolder(out),
        observer=Recorder(),
        **changes,
    )


def assert_same_weights(first: Trainer[Any], second: Trainer[Any]) -> None:
    ours, theirs = first.optimizer.state_tensors(), second.optimizer.state_tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def read_log(trainer: Trainer[Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in trainer.folder.log_path.read_text().splitlines()]


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


def test_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.run()
    trainer.folder.log({"step": 7, "loss": 1.0})
    with open(trainer.folder.log_path, "a") as file:
        file.write('{"step": 8, "lo')  # a line cut by a kill
    again = make_trainer(tmp_path)
    again.resume()
    assert [r["step"] for r in read_log(again)] == [1, 2, 3, 4, 5, 6]


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


def test_the_best_checkpoint_outlives_newer_ones(tmp_path: Path) -> None:
    """T22: it was saved before it was marked, and is never purged while it is the best."""
    scores = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 2.5, 6: 1.5}
    trainer = make_trainer(
        tmp_path,
        loop={"save_every": 3, "eval_every": 1, "keep_checkpoints": 1},
        evaluate=lambda model: {"a": scores[trainer.step] + 1, "b": scores[trainer.step] - 1},
    )
    trainer.run()
    assert [path.name for path in trainer.folder.find_checkpoints()] == ["step-2", "step-6"]
    assert trainer.folder.find_best() == (2, 1.0)
    best = make_trainer(tmp_path)
    assert best.folder.load_best(best.optimizer)["step"] == 2
    resumed = make_trainer(tmp_path)
    resumed.resume()
    assert resumed.step == 6
    marked = [note for note in trainer.observer.notes if "best so far" in note]
    assert len(marked) == 2


def test_a_best_checkpoint_that_was_removed_is_forgotten(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, loop={"eval_every": 2}, evaluate=lambda model: {"a": 1.0})
    trainer.run()
    assert trainer.folder.find_best() == (2, 1.0)
    shutil.rmtree(tmp_path / "checkpoints" / "step-2")
    assert trainer.folder.find_best() is None
    (tmp_path / "checkpoints" / "best.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"best\.json is damaged .*remove it"):
        trainer.folder.find_best()


def test_without_keep_best_only_the_last_stay(tmp_path: Path) -> None:
    loop = {"save_every": 0, "eval_every": 1, "keep_best": False}
    trainer = make_trainer(tmp_path, loop=loop, evaluate=lambda model: {"a": 1.0})
    trainer.run()
    assert [path.name for path in trainer.folder.find_checkpoints()] == ["step-6"]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    """T22."""
    trainer = make_trainer(tmp_path, steps=9, loop={"save_every": 1, "keep_checkpoints": 3})
    trainer.run()
    names = [path.name for path in trainer.folder.find_checkpoints()]
    assert names == ["step-7", "step-8", "step-9"]


def test_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T03."""
    make_trainer(tmp_path, steps=2).run()
    trainer = make_trainer(tmp_path, steps=4)
    trainer.resume()

    def fail(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tramontane.train.checkpoint.save_file", fail)
    with pytest.raises(CapacityError, match="step-4"):
        trainer.run()
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-2"]


def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint to resume from"):
        make_trainer(tmp_path).resume()


def test_resume_refuses_another_model(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=2).run()
    trainer = make_trainer(tmp_path)
    del trainer.optimizer.masters["norm.weight"]
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        trainer.resume()


def test_changed_configuration_is_listed_and_refused(tmp_path: Path) -> None:
    """T31."""
    folder = RunFolder(tmp_path / "run")
    started = {"lr": 1, "model": {"dim": 64}, "sources": ["a"]}
    with folder.lock():
        folder.start(started)
    changed = {"lr": 2, "model": {"dim": 128}, "sources": ["a"]}
    with pytest.raises(ConfigError, match=r"lr: 1 -> 2; model\.dim: 64 -> 128"):
        folder.compare(folder.read_config(), changed)
    folder.write_config(changed)
    folder.compare(folder.read_config(), changed)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "progress.json"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    make_trainer(tmp_path, steps=2).run()
    path = tmp_path / "checkpoints" / "step-2" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{name} is damaged .*checkpoint before it"):
        make_trainer(tmp_path).resume()


def test_nan_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=2, loop={"save_every": 0})
    trainer.run()
    trainer.optimizer.masters["norm.weight"][3] = float("nan")
    trainer.save()
    with pytest.raises(CheckpointError, match=r"master\.norm\.weight holds NaN"):
        make_trainer(tmp_path).resume()


def test_full_disk_while_logging_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T03."""
    trainer = make_trainer(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("json.dumps", fail)
    with pytest.raises(CapacityError, match=r"log\.jsonl: the disk is full"):
        trainer.folder.log({"step": 1})


def test_a_run_is_not_started_over(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=2)
    trainer.run()
    with pytest.raises(ConfigError, match="--resume"):
        trainer.folder.start({})


def test_a_run_that_ended_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start({})
    folder.log({"step": 1})
    folder.start({})
    assert not folder.log_path.exists()


def test_two_trainers_cannot_share_a_folder(tmp_path: Path) -> None:
    """T21."""
    used = pytest.raises(TrainingError, match=f"in use by process {os.getpid()}")
    with RunFolder(tmp_path).lock(), used, RunFolder(tmp_path).lock():
        pass
    with RunFolder(tmp_path).lock():
        pass


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
