"""Whether the engine's thread still moves, as others can tell without asking it.

A pass of a large model on a slow machine may take minutes, but it computes all the while; one that
waits for what never comes uses no processor. So the first is let be and the second found at once.
"""

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tramontane.errors import ConfigError

_LEAST_SHARE = 0.01  # of a processor: a thread that uses less stands still


@dataclass(frozen=True, kw_only=True)
class Patience:
    """When a pass counts as one that never ends. Raises ConfigError, naming the value.

    After `hang_seconds` in which the thread has stood still, or after `max_pass_seconds`, whatever
    it does. The second must be more than the longest pass of `max_num_batched_tokens` takes.
    """

    hang_seconds: float = 3.0
    max_pass_seconds: float = 300.0

    def __post_init__(self) -> None:
        for name in ("hang_seconds", "max_pass_seconds"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be above 0, and finite")


class Pulse:
    """Of one thread: it calls `beat` whenever it comes around, and `rest` before it waits for work.

    Anyone may ask `is_hanging`; who wants to know in time asks a few times in `hang_seconds`.
    `meter` gives the processor seconds that the thread has used (`build_meter`).
    """

    def __init__(
        self, patience: Patience, meter: Callable[[], float], *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._patience, self._meter, self._clock = patience, meter, clock
        self._beat_at: float | None = None  # none at rest
        self._used, self._moved_at = 0.0, -math.inf  # as was last seen

    def beat(self) -> None:
        """It has come around, and goes on."""
        self._beat_at = self._clock()

    def rest(self) -> None:
        """It has nothing to do."""
        self._beat_at = None

    def is_hanging(self) -> bool:
        """Whether it will not come around any more, as far as one can tell."""
        beat_at, now, used = self._beat_at, self._clock(), self._meter()
        hang_seconds = self._patience.hang_seconds
        if used - self._used >= _LEAST_SHARE * hang_seconds:
            self._used, self._moved_at = used, now
        if beat_at is None:
            return False
        is_still = now - max(beat_at, self._moved_at) > hang_seconds
        return is_still or now - beat_at > self._patience.max_pass_seconds


def build_meter() -> Callable[[], float]:
    """Reads the processor seconds of the calling thread, from any thread.

    Where the system does not tell them it is a clock: then every thread seems to move.
    """
    if sys.platform != "linux":
        return time.monotonic
    used = time.pthread_getcpuclockid(threading.get_ident())

    def read() -> float:
        try:
            return time.clock_gettime(used)
        except OSError:  # the thread has just ended
            return 0.0

    return read
