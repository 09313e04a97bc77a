"""The loop: exact resumption, accumulation, and what happens when something breaks."""

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from tests.tiny import make_model
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
    model = make_model(seed=3)
    loop = {"num_steps": steps, "save_every": 2, "log_every": 1} | changes.pop("loop", {})
    return Trainer(
        model=model,
        optimizer=MasterOptimizer(model, OptimizerConfig(kind=kind, lr=1e-3, warmup_steps=2)),
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


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    """T06: rows of unequal length, one batch of 4 against 4 of 1; gradients and loss."""
    loop = {"accumulation": 4, "load_balancing_coef": 0.0, "save_every": 0}
    many = make_trainer(tmp_path / "many", steps=1, loop=loop)
    one = make_trainer(tmp_path / "one", steps=1, rows=4, loop=loop | {"accumulation": 1})
    for trainer in (many, one):
        trainer.optimizer.step = lambda lr: None  # keep the gradients
        trainer.run()
    for name, master in many.optimizer.masters.items():
        torch.testing.assert_close(
            master.grad, one.optimizer.masters[name].grad, atol=1e-6, rtol=1e-5
        )
    (ours,), (theirs,) = many.observer.reports, one.observer.reports
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
    assert ours.num_units == theirs.num_units == sum((16, 17, 18, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, value: float) -> None:
    """T04."""
    trainer = make_trainer(tmp_path)

    def poisoned(model: Transformer, batch: PackedBatch) -> LossTerms:
        terms = compute_next_token_loss(model, batch)
        return terms._replace(objective=terms.objective * value) if trainer.step == 4 else terms

    trainer.compute_loss = poisoned
    with pytest.raises(TrainingError, match="step 5: the loss is"):
        trainer.run()
    assert [path.name for path in trainer.folder.find_checkpoints()] == ["step-2", "step-4"]
    healthy = make_trainer(tmp_path)
    healthy.resume()
    assert_same_weights(trainer, healthy)


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
    with folder.lock():
        folder.start({"lr": 1, "model": {"dim": 64}, "sources": ["a"]})
    changed = {"lr": 2, "model": {"dim": 128}, "sources": ["a"]}
    with pytest.raises(ConfigError, match=r"lr: 1 -> 2; model\.dim: 64 -> 128"):
        folder.compare(changed)
    folder.write_config(changed)
    folder.compare(changed)


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
