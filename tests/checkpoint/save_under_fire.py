"""A program for `test_writer.py`: saves a model, and dies just before its Nth change to the disk.

It forks a process for each N until one lives to the end, and prints as JSON what each left behind.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.tiny import make_config, make_model
from tramontane import atomic
from tramontane.atomic import remove_interrupted_saves
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.writer import save_model
from tramontane.models.transformer import Transformer


class _Countdown:
    """Kills the process at its Nth call."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls -= 1
            if self.calls == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call


def _save_and_die(model: Transformer, folder: Path, calls: int) -> None:
    countdown = _Countdown(calls)
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open"):
        setattr(os, name, countdown.wrap(getattr(os, name)))
    io.open = countdown.wrap(io.open)
    atomic._exchange = countdown.wrap(atomic._exchange)
    save_model(model, folder, dtype=torch.float32, max_shard_bytes=60_000)


def _run_until_dead(model: Transformer, folder: Path, calls: int) -> bool:
    """Whether the save survived."""
    child = os.fork()
    if child == 0:
        _save_and_die(model, folder, calls)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    folder = Path(sys.argv[1]) / "model"
    if sys.argv[2] == "two renames":
        atomic._exchange = lambda first, second: False
    config = make_config(n_layers=1, moe=None)
    models = {seed: make_model(config, seed=seed) for seed in (0, 1)}
    embeddings = {seed: model.tok_embeddings.weight.sum().item() for seed, model in models.items()}
    found, has_survived = [], False
    while not has_survived:
        save_model(models[0], folder, dtype=torch.float32)
        has_survived = _run_until_dead(models[1], folder, len(found) + 1)
        num_left = len(os.listdir(folder.parent)) - 1
        remove_interrupted_saves(folder.parent)
        weight = load_model(folder).tok_embeddings.weight.sum().item()
        seed = next(seed for seed, value in embeddings.items() if value == weight)
        found.append([seed, num_left, os.listdir(folder.parent)])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
