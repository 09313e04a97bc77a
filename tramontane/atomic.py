"""Files and folders that appear whole or not at all, whenever the process is killed.

New content is written beside its target, forced to disk, and only then given the target's name in
one rename. What a killed process left behind is removed by the next save in the same place.
"""

import ctypes
import errno
import glob
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tramontane.errors import CapacityError, StorageError

# A name beside the target tells who works under it: .NAME.tramontane-saving-HOST-PID
_SAVING = ".tramontane-saving-"
_PREVIOUS = ".tramontane-previous-"
_SECONDS_UNTIL_ABANDONED = (
    24 * 3600
)  # for the saves of other machines, whose processes we cannot see
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # <linux/fs.h>


@contextmanager
def atomic_folder(target: Path | str, *, bytes_needed: int = 0) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving without an exception it replaces `target` whole.

    Raises CapacityError when the disk has not `bytes_needed` bytes free or fills up on the way, and
    StorageError when the place cannot be written to. On any exception `target` stays as it was.
    """
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise StorageError(f"{target} is a file; name a folder to write to")
    with _temporary_path(target, bytes_needed) as temporary:
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        _replace_folder(temporary, target)
        sync_path(target.parent)


@contextmanager
def atomic_file(target: Path | str, *, bytes_needed: int = 0) -> Iterator[Path]:
    """Yield a path to write a file at; on leaving without an exception it replaces `target`.

    Raises as `atomic_folder` does.
    """
    target = Path(target).resolve()
    if target.is_dir():
        raise StorageError(f"{target} is a folder; name a file to write to")
    with _temporary_path(target, bytes_needed) as temporary:
        yield temporary
        sync_path(temporary)
        temporary.replace(target)
        sync_path(target.parent)


def remove_interrupted_saves(parent: Path | str) -> None:
    """Remove what killed saves left in `parent`, and undo what they had begun to replace.

    Where two folders cannot change places in one step (see `_replace_folder`) a kill may leave the
    old one under its temporary name only; it gets its own name back.
    """
    parent = Path(parent)
    for path in parent.glob(f".*{_PREVIOUS}*"):
        target = path.with_name(path.name[1:].rpartition(_PREVIOUS)[0])
        if _is_abandoned(path, _PREVIOUS) and not target.exists():
            path.rename(target)
    for mark in (_SAVING, _PREVIOUS):
        for path in parent.glob(f".*{mark}*"):
            if _is_abandoned(path, mark):
                _remove(path)


def find_previous(target: Path) -> Path | None:
    """Where a killed save left the previous version of a `target` that is no longer there."""
    return next(iter(sorted(target.parent.glob(f".{glob.escape(target.name)}{_PREVIOUS}*"))), None)


def require_disk_space(folder: Path, bytes_needed: int) -> None:
    """Raise CapacityError unless the disk of `folder` has `bytes_needed` bytes free."""
    free = _count_free_bytes(folder)
    if bytes_needed > free:
        raise CapacityError(
            f"{folder}: {bytes_needed:,} bytes needed, {free:,} bytes free; "
            "free some space or choose another folder"
        )


def sync_path(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary_path(target: Path, bytes_needed: int) -> Iterator[Path]:
    """A name beside `target` that tells whose it is; gone afterwards, whatever happens."""
    temporary = _mark_path(target, _SAVING)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_interrupted_saves(target.parent)
        require_disk_space(target.parent, bytes_needed)
        _remove(temporary)
        try:
            yield temporary
        finally:
            _remove(temporary)
    except OSError as error:
        raise explain_os_error(error, target, bytes_needed=bytes_needed) from error


def explain_os_error(
    error: OSError, target: Path, *, bytes_needed: int = 0
) -> CapacityError | StorageError:
    """What to raise when writing to `target` fails: CapacityError for a full disk."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{target} cannot be written: {error}")
    needed = f"{bytes_needed:,} bytes needed, " if bytes_needed else ""
    return CapacityError(
        f"{target}: the disk is full ({error.strerror}): {needed}"
        f"{_count_free_bytes(target.parent):,} bytes free; nothing half-written stays there"
    )


def _count_free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_path(Path(root, name))
        sync_path(Path(root))


def _replace_folder(new: Path, target: Path) -> None:
    """Give `new` the name of `target`; afterwards the old folder, if any, has the name of `new`.

    A rename cannot replace a folder that has files in it. Linux lets two folders change places in
    one step; elsewhere the old one steps aside first, and `remove_interrupted_saves` brings it back
    if the process is killed between the two renames.
    """
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        previous = _mark_path(target, _PREVIOUS)
        target.rename(previous)
        try:
            new.rename(target)
        except OSError:
            previous.rename(target)
            raise
        previous.rename(new)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _mark_path(target: Path, mark: str) -> Path:
    return target.with_name(f".{target.name}{mark}{socket.gethostname()}-{os.getpid()}")


def _is_abandoned(path: Path, mark: str) -> bool:
    """Whether the process that worked under this name is gone."""
    host, _, pid = path.name.rpartition(mark)[2].rpartition("-")
    if host == socket.gethostname() and pid.isdecimal() and not _is_running(int(pid)):
        return True
    try:
        return time.time() - path.stat().st_mtime > _SECONDS_UNTIL_ABANDONED
    except FileNotFoundError:  # its process has just finished
        return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
