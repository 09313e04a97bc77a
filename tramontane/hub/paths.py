"""File names that others wrote, in a manifest, a torrent or a hub's listing: never out of a folder.

A hub's cache keeps each file once, under its hash, and links to it from `snapshots/COMMIT/`; links
may therefore lead anywhere inside that cache, and elsewhere nowhere but into the folder itself.
"""

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from tramontane.errors import CheckpointError

_SNAPSHOTS = "snapshots"


def check_parts(parts: Sequence[str], *, source: str) -> str:
    """The parts of a relative path, joined by "/". Raises CheckpointError on one that leads out.

    `source` says in the message where the path was read.
    """
    path = "/".join(parts)
    for part in parts:
        if part in ("", ".", "..") or not part.isprintable() or set(part) & set("/\\:"):
            raise CheckpointError(
                f"{source} names the file {path!r}, whose part {part!r} is not a plain name; "
                "nothing outside the folder is read"
            )
    if not parts:
        raise CheckpointError(f"{source} names a file without a name")
    return path


def check_relative_path(path: str, *, source: str) -> str:
    """As `check_parts`, for a path with slashes; "./a//b" is "a/b"."""
    if path.startswith("/"):
        raise CheckpointError(
            f"{source} names the file {path!r}; a path must be relative to the folder"
        )
    return check_parts([p for p in path.split("/") if p not in ("", ".")], source=source)


def locate(folder: Path, path: str, *, source: str) -> Path:
    """The place of a checked path in `folder`. Raises CheckpointError if a link leads out of it."""
    place = folder / path
    if not place.resolve().is_relative_to(find_boundary(folder)):
        raise CheckpointError(
            f"{place} leads to {place.resolve()}, outside the folder; replace the link that "
            f"{source} would follow by the file itself"
        )
    return place


def find_boundary(folder: Path) -> Path:
    """What links in `folder` may lead to: the folder, or the whole cache for a hub's snapshot."""
    folder = folder.resolve()
    return folder.parents[2] if is_snapshot(folder) else folder


def is_snapshot(folder: Path) -> bool:
    """Whether this is CACHE/models--ORG--NAME/snapshots/COMMIT."""
    folder = folder.resolve()
    return (
        folder.parent.name == _SNAPSHOTS
        and "--" in folder.parent.parent.name
        and (folder.parent.parent / "blobs").is_dir()
    )


def is_path(name: str) -> bool:
    """Whether something lies there. Raises PermissionError where nobody may look."""
    try:
        return Path(name).exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def list_files(folder: Path) -> Iterator[str]:
    """Relative paths of all files in `folder`, sorted.

    Hidden ones are left out, and pipes, sockets and devices, which have no end; links to nothing
    are not.
    """
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        is_other = path.is_dir() or (path.exists() and not path.is_file())
        if not is_other and not any(part.startswith(".") for part in relative.parts):
            yield relative.as_posix()


def show_name(name: str) -> str:
    """A file's name for the terminal: control characters become escapes."""
    return name if name.isprintable() else ascii(name)[1:-1]
