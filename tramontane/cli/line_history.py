"""Line editing and a history that outlives the session, where Python has readline."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tramontane.cli.notices import say

MAX_LINES = 1000


def find_history_file() -> Path:
    """In the user's state folder: $XDG_STATE_HOME/tramontane/history."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "tramontane" / "history"


@contextmanager
def keep_history() -> Iterator[None]:
    """Recall earlier lines within, and save them after; a failure to do so is said, and no more."""
    try:
        import readline
    except ImportError:
        say("no line editing: this Python was built without readline")
        yield
        return
    path = find_history_file()
    readline.set_history_length(MAX_LINES)
    if path.is_file():
        _try(readline.read_history_file, path)
    try:
        yield
    finally:
        _try(_save, path)


def _save(path: Path) -> None:
    import readline

    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    readline.write_history_file(path)


def _try(action: Callable[[Path], None], path: Path) -> None:
    try:
        action(path)
    except OSError as error:
        say(f"the history file {path} cannot be used ({error})")
