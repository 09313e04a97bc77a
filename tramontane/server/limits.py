"""How much one key may ask: requests per minute, and requests at a time."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tramontane.server.errors import limited


class KeyLimits:
    """Counts per tenant; None is no limit. Raises ApiError 429.

    The rate is a bucket that holds `rate_limit` requests and fills up in a minute.
    """

    def __init__(
        self, *, rate_limit: int | None, max_concurrency: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._rate_limit, self._max_concurrency, self._clock = rate_limit, max_concurrency, clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tenant -> requests left, when
        self._running: Counter[str] = Counter()

    @contextmanager
    def admit(self, tenant: str) -> Iterator[None]:
        """For as long as a request runs."""
        self._check_concurrency(tenant)
        self._take_from_bucket(tenant)
        self._running[tenant] += 1
        try:
            yield
        finally:
            self._running[tenant] -= 1
            if not self._running[tenant]:
                del self._running[tenant]

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return self._running.total()

    def _check_concurrency(self, tenant: str) -> None:
        if self._max_concurrency is not None and self._running[tenant] >= self._max_concurrency:
            raise limited(
                f"this key has {self._max_concurrency} requests running, as many as it may; wait "
                f"for one of them",
                code="too_many_concurrent_requests",
                retry_after=1,
            )

    def _take_from_bucket(self, tenant: str) -> None:
        if self._rate_limit is None:
            return
        now, full = self._clock(), float(self._rate_limit)
        left, at = self._buckets.get(tenant, (full, now))
        left = min(full, left + (now - at) * full / 60)
        if left < 1:
            raise limited(
                f"this key may send {self._rate_limit} requests a minute",
                code="rate_limit_exceeded",
                retry_after=(1 - left) * 60 / full,
            )
        self._buckets[tenant] = (left - 1, now)
