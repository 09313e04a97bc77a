"""Words of a file that nobody vouches for, made fit for a message: short, printable, harmless."""

import math
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tramontane.errors import CheckpointError

MAX_BYTES = 2**60  # no file, offset or product of sizes goes beyond
MAX_RANK = 8
_MAX_NAME = 256


def shorten(value: Any) -> str:
    """At most 80 characters of ASCII; what lies inside of nested values is left out."""
    if isinstance(value, list | tuple):
        items = [_show(item) for item in value[:8]] + ["..."] * (len(value) > 8)
        text = f"[{', '.join(items)}]"
    else:
        text = _show(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_countable(sizes: Sequence[int]) -> bool:
    """Whether sizes, and what they span with zeros left out (torch multiplies so), have a limit."""
    return math.prod(max(1, size) for size in sizes) <= MAX_BYTES


def require_regular(path: Path) -> os.stat_result:
    """What the system says of a file. CheckpointError if it is none: a pipe could wait for ever.

    Raises OSError, naming the path, if there is nothing.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise CheckpointError(f"{path} is {kind}; a regular file belongs there")
    return status


def check_name(name: str, *, where: str) -> str:
    """The name itself. CheckpointError if it cannot be shown: empty, endless or not printable."""
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        raise CheckpointError(
            f"{where} is {shorten(name)} of {len(name):,} characters; 1 to {_MAX_NAME} that can "
            "be printed belong there: a damaged file?"
        )
    return name


def _show(value: Any) -> str:
    if isinstance(value, str):
        return ascii(value[:80])
    if isinstance(value, bool | int | float | None):
        return repr(value)
    return f"a {type(value).__name__}"
