"""T30: Ctrl-C once saves and ends with 130; twice ends at once, with the last checkpoint whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_kill import write_inputs
from tests.train.trainers import assert_same_weights, make_trainer

# `tramontane train` whose steps say that they have begun and then take a while.
PROGRAM = """
import sys, time
from tramontane.cli.main import main
from tramontane.train import pretrain
real = pretrain.compute_next_token_loss
def slow(model, batch):
    print("in a step", file=sys.stderr, flush=True)
    time.sleep(0.5)
    return real(model, batch)
pretrain.compute_next_token_loss = slow
main()
"""


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    arguments = [
        "train", str(folder / "run.toml"), "--source", str(folder / "tales.jsonl"),
        "--out", str(folder / "run"), "--vocab-size", "262", "--seq-len", "32",
        "--batch-size", "2", "--steps", "1000", "--dtype", "float32", "--eval-every", "0",
        "--sample-every", "0", "--save-every", "2", "--threads", "1", *flags,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, text=True
    )


def list_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    names = folder.glob("run/checkpoints/step-*/progress.json")
    return sorted(json.loads(path.read_text())["step"] for path in names)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Read what the process says until a line holds `text`."""
    assert process.stderr is not None
    assert any(text in line for line in process.stderr)


def test_t30_the_command_ends_with_130(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    once = start(tmp_path)
    wait_for(once, "in a step")
    once.send_signal(signal.SIGINT)
    _, errors = once.communicate(timeout=60)
    assert once.returncode == 130
    assert "finishing this step, then saving" in errors
    assert "stopped after step 1; go on with --resume" in errors
    assert list_steps(tmp_path) == [1]

    twice = start(tmp_path, "--resume")
    wait_for(twice, "resumed after step 1")
    wait_for(twice, "in a step")
    twice.send_signal(signal.SIGINT)
    wait_for(twice, "once more to stop at once")
    twice.send_signal(signal.SIGINT)
    _, errors = twice.communicate(timeout=60)
    assert twice.returncode == 130
    assert errors == ""
    assert list_steps(tmp_path) == [1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_t30_a_second_signal_ends_the_step(tmp_path: Path, name: str) -> None:
    """In the backward pass, inside torch; what was saved before can be resumed."""
    trainer = make_trainer(tmp_path)

    def interrupt(grad: Any) -> None:
        if trainer.step == 3:
            os.kill(os.getpid(), getattr(signal, name))
            os.kill(os.getpid(), getattr(signal, name))

    trainer.model.layers[0].attention.wq.weight.register_hook(interrupt)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    resumed, whole = make_trainer(tmp_path), make_trainer(tmp_path / "whole")
    resumed.resume()
    assert resumed.run()
    assert whole.run()
    assert_same_weights(resumed, whole)
