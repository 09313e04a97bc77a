"""How far a long reading or fetching of bytes has come, told to whoever shows it."""

from collections.abc import Callable

OnBytes = Callable[[int, int], None]  # (bytes done, bytes in all)


def ignore_bytes(done: int, total: int) -> None:
    """Show nothing."""


class Meter:
    """Counts the bytes of one piece of work and reports each step."""

    def __init__(self, total: int, on_bytes: OnBytes) -> None:
        self.done = 0
        self._total, self._on_bytes = total, on_bytes
        on_bytes(0, total)

    def add(self, count: int) -> None:
        """Note that `count` more bytes are done; a negative count takes some back."""
        self.done += count
        self._on_bytes(self.done, self._total)
