"""Files and folders that appear whole or not at all, whenever the process is killed.

New content is written beside its target, forced to disk, and only then given the target's name in
one rename. What a killed process left behind is removed by the next save in the same place.
"""

import ctypes
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tramontane.errors import CapacityError, CheckpointError

_TEMPORARY = ".saving-"
_PREVIOUS = ".previous"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # <linux/fs.h>


@contextmanager
def atomic_folder(target: Path | str, *, bytes_needed: int = 0) -> Iterator[Path]:
    """Yield an empty folder to fill; on leaving without an exception it replaces `target` whole.

    Raises CapacityError when the disk has not `bytes_needed` bytes free or fills up on the way, and
    CheckpointError when the place cannot be written to. On any exception `target` stays as it was.
    """
    target = Path(target).absolute()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; name a folder to write to")
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
    target = Path(target).absolute()
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name a file to write to")
    with _temporary_path(target, bytes_needed) as temporary:
        yield temporary
        sync_path(temporary)
        temporary.replace(target)
        sync_path(target.parent)


def remove_interrupted_saves(parent: Path | str) -> None:
    """Remove what killed saves of this machine left in `parent`, and finish what they had to undo.

    Where two folders cannot change places in one step (see `_replace_folder`) a kill may leave only
    `.NAME.previous`; it gets its name back.
    """
    parent = Path(parent)
    for path in parent.glob(f".*{_TEMPORARY}*"):
        host, _, pid = path.name.partition(_TEMPORARY)[2].rpartition("-")
        if host == socket.gethostname() and pid.isdecimal() and not _is_running(int(pid)):
            _remove(path)
    for path in parent.glob(f".*{_PREVIOUS}"):
        target = path.with_name(path.name[1 : -len(_PREVIOUS)])
        if target.exists():
            _remove(path)
        else:
            path.rename(target)


def require_disk_space(folder: Path, bytes_needed: int) -> None:
    """Raise CapacityError unless the disk of `folder` has `bytes_needed` bytes free."""
    free = shutil.disk_usage(folder).free
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
    suffix = f"{_TEMPORARY}{socket.gethostname()}-{os.getpid()}"
    temporary = target.with_name(f".{target.name}{suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_interrupted_saves(target.parent)
        require_disk_space(target.parent, bytes_needed)
        _remove(temporary)
        yield temporary
    except OSError as error:
        raise _explain(error, target, bytes_needed) from error
    finally:
        _remove(temporary)


def _explain(error: OSError, target: Path, bytes_needed: int) -> CapacityError | CheckpointError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(f"{target} cannot be written: {error}")
    free = shutil.disk_usage(target.parent).free
    return CapacityError(
        f"{target}: the disk is full ({error.strerror}): {bytes_needed:,} bytes needed, {free:,} "
        "bytes free; what was there before is untouched"
    )


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
        previous = target.with_name(f".{target.name}{_PREVIOUS}")
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
