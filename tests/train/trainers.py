"""A small trainer on batches that are functions of their number, and what tests look at in it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tests.tiny import make_config, make_model
from tramontane.config import MoeConfig
from tramontane.data.packing import PackedBatch
from tramontane.train.checkpoint import RunFolder
from tramontane.train.loop import LoopConfig, StepReport, Trainer
from tramontane.train.losses import compute_next_token_loss
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
