"""The run folder: which checkpoints stay, what is refused, and a disk that is full."""

import os
import shutil
from pathlib import Path

import pytest

from tests.train.trainers import make_trainer, read_log
from tramontane.errors import CapacityError, CheckpointError, ConfigError, TrainingError
from tramontane.train.checkpoint import RunFolder


def test_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.run()
    trainer.folder.log({"step": 7, "loss": 1.0})
    with open(trainer.folder.log_path, "a") as file:
        file.write('{"step": 8, "lo')  # a line cut by a kill
    again = make_trainer(tmp_path)
    again.resume()
    assert [r["step"] for r in read_log(again)] == [1, 2, 3, 4, 5, 6]


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
