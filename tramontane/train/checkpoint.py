"""A run on disk: its configuration, its log, and checkpoints from which it goes on bit by bit.

OUT/config.json            what was asked for
OUT/log.jsonl              one line per report
OUT/checkpoints/step-N/    optimizer.safetensors, progress.json; whole or not there at all
OUT/checkpoints/best.json  which of them had the lowest held-out score
OUT/lock                   held while a process trains here
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tramontane.atomic import (
    atomic_file,
    atomic_folder,
    explain_os_error,
    remove_interrupted_saves,
)
from tramontane.errors import CheckpointError, ConfigError, TrainingError
from tramontane.train.optim import MasterOptimizer

_TENSORS, _PROGRESS, _BEST = "optimizer.safetensors", "progress.json", "best.json"
_REMEDY = "remove its folder to resume from the checkpoint before it, if there is one"


class Best(NamedTuple):
    """The step whose checkpoint had the lowest held-out score, a mean of domains."""

    step: int
    score: float


class RunFolder:
    """The folder of one training run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.log_path = self.path / "log.jsonl"
        self._checkpoints = self.path / "checkpoints"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out. Raises TrainingError that names the process already here.

        Raises StorageError if the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        with open(self.path / "lock", "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise TrainingError(
                    f"{self.path} is in use by process {file.read().strip() or 'unknown'}; wait "
                    "for it, or choose another --out"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def start(self, config: dict[str, Any]) -> None:
        """Begin a new run. Raises ConfigError if there is one that can be resumed."""
        if self.find_checkpoints():
            raise ConfigError(
                f"{self.path} already holds a run: go on with --resume, or choose another --out"
            )
        self.log_path.unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        (self._checkpoints / _BEST).unlink(missing_ok=True)
        self.write_config(config)

    def read_config(self) -> dict[str, Any]:
        """What the run was asked for. Raises CheckpointError if there is no run here."""
        path = self.path / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{self.path} holds no run to resume (no config.json); check --out, or start "
                "without --resume"
            )
        return _read_json(path)

    def compare(self, saved: dict[str, Any], config: dict[str, Any]) -> None:
        """Raise ConfigError that lists the fields in which `config` differs from `saved`."""
        old, new = _flatten(saved), _flatten(config)
        changes = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if changes:
            raise ConfigError(
                f"{self.path} was started with another configuration ({'; '.join(changes)}); "
                "go on with the same one, or say --override"
            )

    def write_config(self, config: dict[str, Any]) -> None:
        """Keep what the run is asked for from now on."""
        with atomic_file(self.path / "config.json") as path:
            path.write_text(json.dumps(config, indent=2) + "\n")

    def find_checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(
            self._checkpoints.glob("step-*"), key=lambda path: int(path.name.partition("-")[2])
        )

    def find_best(self) -> Best | None:
        """The checkpoint that was marked as best, if it is still there."""
        path = self._checkpoints / _BEST
        if not path.is_file():
            return None
        values = _read_json(path)
        try:
            best = Best(int(values["step"]), float(values["score"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); remove it") from error
        return best if self._name(best.step).is_dir() else None

    def mark_best(self, best: Best) -> None:
        """Keep the checkpoint of `best.step`, which is there, until another is better."""
        with atomic_file(self._checkpoints / _BEST) as path:
            path.write_text(json.dumps(best._asdict()))

    def save(self, optimizer: MasterOptimizer, progress: dict[str, Any], *, keep: int = 2) -> Path:
        """Write a checkpoint after `progress["step"]` steps; then drop all but the `keep` newest.

        The best one stays too. Raises CapacityError when the disk is full; older checkpoints stay.
        """
        tensors = optimizer.state_tensors()
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        target = self._name(progress["step"])
        with atomic_folder(target, bytes_needed=size + 1_000_000) as folder:
            save_file(tensors, folder / _TENSORS)
            (folder / _PROGRESS).write_text(json.dumps(progress))
        best = self.find_best()
        for old in self.find_checkpoints()[:-keep]:
            if best is None or old != self._name(best.step):
                shutil.rmtree(old)
        return target

    def load(self, optimizer: MasterOptimizer) -> dict[str, Any]:
        """Restore the newest checkpoint and return its progress; the log forgets what came after.

        Raises CheckpointError if there is none or it does not fit the model.
        """
        remove_interrupted_saves(self._checkpoints)
        checkpoints = self.find_checkpoints()
        if not checkpoints:
            raise CheckpointError(
                f"{self._checkpoints} holds no checkpoint to resume from; start without --resume"
            )
        progress = self._restore(checkpoints[-1], optimizer)
        self._forget_after(progress["step"])
        return progress

    def load_best(self, optimizer: MasterOptimizer) -> dict[str, Any]:
        """Restore the best checkpoint, which is there; its progress. Errors as for `load`."""
        best = self.find_best()
        assert best is not None, self.path
        return self._restore(self._name(best.step), optimizer)

    def _restore(self, checkpoint: Path, optimizer: MasterOptimizer) -> dict[str, Any]:
        """Give `optimizer` and its model the tensors of a checkpoint; returns its progress.

        Raises CheckpointError if it is damaged or does not fit the model.
        """
        tensors, progress = _read_checkpoint(checkpoint)
        expected = optimizer.state_tensors()
        differing = [
            name
            for name in sorted(expected.keys() | tensors.keys())
            if name not in tensors or name not in expected
            or tensors[name].shape != expected[name].shape
        ]  # fmt: skip
        if differing:
            raise CheckpointError(
                f"{checkpoint} does not fit the model: {differing[0]} is missing or has "
                f"another shape ({len(differing)} such); resume with the configuration of the run"
            )
        optimizer.load_state_tensors(tensors, num_steps=progress["step"])
        return progress

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the log. Raises CapacityError or StorageError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.log_path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise explain_os_error(error, self.log_path) from error

    def _name(self, step: int) -> Path:
        return self._checkpoints / f"step-{step}"

    def _forget_after(self, step: int) -> None:
        if not self.log_path.exists():
            return
        lines = self.log_path.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        with atomic_file(self.log_path) as path:
            path.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))


def _read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and progress. Raises CheckpointError that names the file and the remedy."""
    path = folder / _TENSORS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_REMEDY}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity; {_REMEDY}")
    progress = _read_json(folder / _PROGRESS)
    if missing := {"step", "num_units_seen", "source"} - progress.keys():
        raise CheckpointError(f"{folder / _PROGRESS} lacks {sorted(missing)}; {_REMEDY}")
    return tensors, progress


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {_REMEDY}") from error
    return values


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list | tuple):
        items = {str(index): value for index, value in enumerate(values)}.items()
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat
