"""What the server is doing: loading, ready, draining or lost; and who waits for an answer."""

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Literal, Protocol

from tramontane.errors import UnavailableError
from tramontane.server.errors import LOADING, ApiError
from tramontane.server.limits import KeyLimits
from tramontane.server.metrics import ServerMetrics
from tramontane.server.ports import ServingEngine
from tramontane.server.settings import ServerSettings
from tramontane.server.usage import CostMeter

_log = logging.getLogger("tramontane.server")
CHECK_SECONDS = 0.5  # between two looks at the engine's health
_MAX_NAMES_LOGGED = 1000

Phase = Literal["loading", "ready", "draining"]


class Waiting(Protocol):
    """A request that waits for the engine."""

    def fail(self, error: Exception) -> None:
        """End the wait with this error."""


class ServerState:
    """One per application. The engine comes later than the first request: models take time."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.limits = KeyLimits(
            rate_limit=settings.rate_limit, max_concurrency=settings.max_concurrency
        )
        self.metrics = ServerMetrics()
        self.phase: Phase = "loading"
        self.started_at = int(time.time())
        self._engine: ServingEngine | None = None
        self._cost_meter: CostMeter | None = None
        self._waiting: set[Waiting] = set()
        self._names_logged: set[str] = set()

    def attach(self, engine: ServingEngine) -> None:
        """The model is there. The engine must have started."""
        self._engine = engine
        self._cost_meter = CostMeter(engine.model, price_per_hour=self.settings.price_per_hour)
        self.metrics.watch_engine(engine, model_name=self.model_name)
        self.phase = "ready"

    @property
    def engine(self) -> ServingEngine:
        """Raises UnavailableError while the model loads."""
        if self._engine is None:
            raise UnavailableError(LOADING)
        return self._engine

    @property
    def cost_meter(self) -> CostMeter:
        """Raises UnavailableError while the model loads."""
        if self._cost_meter is None:
            raise UnavailableError(LOADING)
        return self._cost_meter

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names that requests may use."""
        return self.settings.served_model_names or (self.engine.model.name,)

    def require_engine(self, model: str | None = None) -> ServingEngine:
        """The engine, to ask something of it. Raises UnavailableError, and ApiError 404."""
        engine = self.engine
        if model is not None and model not in self.model_names:
            raise ApiError(
                404, f"there is no model {model!r} here; there is {', '.join(self.model_names)}",
                type="invalid_request_error", code="model_not_found", param="model",
            )  # fmt: skip
        self.require_healthy()
        return engine

    def require_healthy(self) -> None:
        """Raises UnavailableError, saying why requests would not be answered."""
        if self.phase == "draining":
            raise UnavailableError("the server is stopping, and takes no more requests")
        if not self.engine.is_healthy():
            raise UnavailableError(
                "the engine has died or hangs; if this lasts, the server must be restarted"
            )

    def add_waiting(self, waiting: Waiting) -> None:
        """Have it told if the engine is lost."""
        self._waiting.add(waiting)

    def remove_waiting(self, waiting: Waiting) -> None:
        """It has its answer."""
        self._waiting.discard(waiting)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the engine."""
        return len(self._waiting)

    def fail_waiting(self, reason: str) -> None:
        """Tell all who wait that there will be no answer."""
        for waiting in list(self._waiting):
            waiting.fail(UnavailableError(reason))

    async def watch_engine(self) -> None:
        """Forever: whoever waits for an engine that died or hangs is told, and waits no longer."""
        was_healthy = True
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            is_healthy = self._engine is None or self._engine.is_healthy()
            if is_healthy != was_healthy and self.phase == "ready":
                news = "goes on" if is_healthy else "has died or hangs"
                _log.error("the engine %s; %d requests wait", news, len(self._waiting))
            was_healthy = is_healthy
            if not is_healthy:
                self.fail_waiting("the engine has stopped answering")

    def log_unknown(self, names: Iterable[str]) -> None:
        """Say once of each field that it has no effect."""
        for name in names:
            if name not in self._names_logged and len(self._names_logged) < _MAX_NAMES_LOGGED:
                self._names_logged.add(name)
                _log.warning("requests hold the field %s, which has no effect", ascii(name[:100]))
