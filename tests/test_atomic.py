"""Rows T02 and T03 of the reliability table, for files and folders of any content."""

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tramontane import atomic
from tramontane.atomic import (
    atomic_file,
    atomic_folder,
    find_previous,
    remove_interrupted_saves,
)
from tramontane.errors import CapacityError, StorageError

_SAVE = """
import sys
from tramontane.atomic import atomic_folder
with atomic_folder(sys.argv[1], bytes_needed=10) as folder:
    for name in ("a", "b"):
        (folder / name).write_text("new " * 5)
"""
_SYSCALLS = "fsync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,openat,write"
_needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def _write_folder(folder: Path, text: str) -> None:
    with atomic_folder(folder) as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(text * 5)


def _write_half(path: Path) -> None:
    path.write_text("half")
    raise KeyboardInterrupt


def _read_folder(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


_OLD, _NEW = (dict.fromkeys(("a", "b"), f"{text} " * 5) for text in ("old", "new"))


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def can_exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to replace a folder: file systems without the exchange exist."""
    if not request.param:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param


@pytest.mark.usefixtures("can_exchange")
def test_folder_is_made_and_replaced_as_a_whole(tmp_path: Path) -> None:
    _write_folder(tmp_path / "x" / "model", "old ")
    (tmp_path / "x" / "model" / "c").write_text("only in the old one")
    _write_folder(tmp_path / "x" / "model", "new ")
    assert _read_folder(tmp_path / "x" / "model") == _NEW
    assert os.listdir(tmp_path / "x") == ["model"]


def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    _write_folder(tmp_path / "model", "old ")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "model") as folder:
        _write_half(folder / "a")
    assert _read_folder(tmp_path / "model") == _OLD
    assert os.listdir(tmp_path) == ["model"]


def test_file_is_replaced_or_left(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_file(tmp_path / "log.json") as path:
            path.write_text(text)
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "log.json") as path:
        _write_half(path)
    assert (tmp_path / "log.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["log.json"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    _write_folder(tmp_path / "model", "old ")
    (tmp_path / "latest").symlink_to(tmp_path / "model")
    _write_folder(tmp_path / "latest", "new ")
    assert (tmp_path / "latest").is_symlink()
    assert _read_folder(tmp_path / "model") == _NEW


def test_kinds_of_target_are_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(StorageError, match="is a folder"), atomic_file(tmp_path):
        pass
    with pytest.raises(StorageError, match="file/x cannot be written"):
        _write_folder(tmp_path / "file" / "x", "new ")


def test_t03_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    needed = 2**60
    with (
        pytest.raises(CapacityError, match=rf"{needed:,} bytes needed, [\d,]+ bytes free") as error,
        atomic_folder(tmp_path / "model", bytes_needed=needed),
    ):
        pytest.fail("the body must not run")
    assert str(tmp_path) in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_t03_a_failing_fsync_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    _write_folder(tmp_path / "model", "old ")

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    kind = StorageError if code == errno.EIO else CapacityError
    with pytest.raises(kind, match=str(tmp_path / "model")):
        _write_folder(tmp_path / "model", "new ")
    assert _read_folder(tmp_path / "model") == _OLD
    assert os.listdir(tmp_path) == ["model"]


def test_leftovers_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    host, mark = socket.gethostname(), ".model.tramontane-saving-"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    yesterday = time.time() - 25 * 3600
    kept = [f"{mark}{host}-{os.getppid()}", f"{mark}another-host-1", ".bashrc.previous"]
    removed = [f"{mark}{host}-{dead.pid}", f"{mark}an-old-host-1"]
    for name in kept + removed:
        (tmp_path / name).mkdir()
    os.utime(tmp_path / removed[1], (yesterday, yesterday))
    remove_interrupted_saves(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


def test_a_kill_between_two_renames_is_undone(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _write_folder(tmp_path / "model", "old ")
    name = f".model.tramontane-previous-{socket.gethostname()}-{dead.pid}"
    (tmp_path / "model").rename(tmp_path / name)
    assert find_previous(tmp_path / "model") == tmp_path / name
    remove_interrupted_saves(tmp_path)
    assert _read_folder(tmp_path / "model") == _OLD
    assert find_previous(tmp_path / "model") is None


def _trace_save(folder: Path, log: Path, *options: str) -> int:
    """Exit status of a process that saves `folder` under strace."""
    command = ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={_SYSCALLS}", *options]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    save = [sys.executable, "-c", _SAVE, str(folder)]
    return subprocess.run([*command, *save], env=environment, capture_output=True).returncode


def _list_steps(log: Path, folder: Path) -> list[tuple[str, int]]:
    """The calls by which a save changes the disk, as (name, how many of this name came before)."""
    counts: dict[str, int] = {}
    steps = []
    for line in log.read_text().splitlines():
        call = line.split(maxsplit=1)[1].partition("(")[0]
        counts[call] = counts.get(call, 0) + 1
        changes = call != "openat" or "O_CREAT" in line
        if changes and str(folder.parent) in line:
            steps.append((call, counts[call]))
    return steps


@_needs_strace
def test_t02_killed_at_any_system_call_the_folder_is_old_or_new(tmp_path: Path) -> None:
    """T02: every fsync, rename, unlink, write and O_CREAT of one save over an existing folder."""
    folder, log = tmp_path / "saves" / "model", tmp_path / "log"
    _write_folder(folder, "old ")
    if _trace_save(folder, log) != 0:
        pytest.skip("strace may not trace here")
    steps = _list_steps(log, folder)
    assert {"fsync", "renameat2", "unlinkat", "openat", "write"} <= {call for call, _ in steps}
    for call, number in steps:
        _write_folder(folder, "old ")
        inject = f"inject={call}:signal=KILL:when={number}"
        assert _trace_save(folder, log, "-e", inject) != 0, inject
        assert _read_folder(folder) in (_OLD, _NEW), inject
        assert len(os.listdir(folder.parent)) <= 2, inject
        remove_interrupted_saves(folder.parent)
        assert os.listdir(folder.parent) == ["model"], inject


@_needs_strace
@pytest.mark.parametrize("calls", ["write", "fsync"])
def test_t03_a_disk_that_fills_at_any_call_leaves_the_old_folder(
    tmp_path: Path, calls: str
) -> None:
    """T03: ENOSPC from the system itself, at each write and fsync of one save."""
    folder, log = tmp_path / "saves" / "model", tmp_path / "log"
    _write_folder(folder, "old ")
    if _trace_save(folder, log) != 0:
        pytest.skip("strace may not trace here")
    steps = [step for step in _list_steps(log, folder) if step[0] == calls]
    # The last fsync is that of the parent, after the rename: the new version is in place by then.
    before_rename = steps[:-1] if calls == "fsync" else steps
    assert before_rename
    for call, number in before_rename:
        _write_folder(folder, "old ")
        assert _trace_save(folder, log, "-e", f"inject={call}:error=ENOSPC:when={number}") == 1
        assert _read_folder(folder) == _OLD, number
        assert os.listdir(folder.parent) == ["model"], number
