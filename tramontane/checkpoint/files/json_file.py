"""JSON files of a checkpoint, configurations and indexes, which have to be small."""

from pathlib import Path
from typing import Any

from tramontane.bounded_json import ALLOWANCE, parse_json
from tramontane.checkpoint.files.untrusted import require_regular
from tramontane.errors import CheckpointError

# Its bytes and what they say lie in memory at once; the index of Mixtral 8x22B has 200 KB.
MAX_BYTES = ALLOWANCE


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises CheckpointError if there is none, or too much."""
    return parse_json(read_small_file(path), where=str(path))


def read_small_file(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """All bytes of a file. CheckpointError if it is not there, cannot be read, or is too large."""
    check_size(path, max_bytes=max_bytes)
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def check_size(path: Path, *, max_bytes: int) -> None:
    """Raise CheckpointError if a file is not there, no regular one, or too large."""
    try:
        size = require_regular(path).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}; incomplete download?") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if size > max_bytes:
        raise CheckpointError(f"{path} has {size:,} bytes; no model's has more than {max_bytes:,}")
