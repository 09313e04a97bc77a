"""uvicorn's HTTP/1.1 connection with the limits that it lacks, and errors in our shape.

Headers must arrive in time and fit their limit, a client that does not read is let go, and there is
a most of connections. Bodies are the gate's concern.
"""

import asyncio
import sys
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from tramontane.server.errors import ApiError, describe_status
from tramontane.server.settings import ServerSettings


class ConnectionConfig(Config):
    """uvicorn's configuration, with ours beside it."""

    def __init__(self, app: Any, settings: ServerSettings) -> None:
        super().__init__(
            app,
            host=settings.host,
            port=settings.port,
            http=GuardedConnection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # who connects is who asks; a header proves nothing
            server_header=False,
            timeout_keep_alive=max(1, round(settings.keep_alive_timeout)),
            timeout_graceful_shutdown=5,  # the engine has been drained before
            h11_max_incomplete_event_size=settings.max_header_bytes,
        )
        self.settings = settings


class GuardedConnection(H11Protocol):
    """One connection."""

    config: ConnectionConfig
    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected; its first request must come in time."""
        super().connection_made(transport)
        if len(self.connections) > self.config.settings.max_connections:
            self._refuse(describe_status(503, "the server has as many connections as it may"))
        else:
            self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came; the timer runs until the headers they belong to are whole."""
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.IDLE:
            self._start_header_timer()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()

    def on_response_complete(self) -> None:
        """The next request on this connection may be half here already."""
        super().on_response_complete()
        if self.conn.their_state is not h11.IDLE:
            self._stop_header_timer()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or too long; uvicorn calls this while it handles h11's error."""
        error = sys.exc_info()[1]
        hint = getattr(error, "error_status_hint", 400)
        texts = {431: f"the headers are longer than {self.config.settings.max_header_bytes} bytes"}
        self._refuse(describe_status(hint, texts.get(hint, "this is not an HTTP/1.1 request")))

    def pause_writing(self) -> None:
        """The client does not read what it asked for."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(
            self.config.settings.write_timeout, self.transport.abort
        )

    def resume_writing(self) -> None:
        """It reads again."""
        self._stop_write_timer()
        super().resume_writing()

    def _start_header_timer(self) -> None:
        if self._header_timer is None:
            seconds = self.config.settings.read_timeout
            self._header_timer = self.loop.call_later(seconds, self._give_up_headers)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _give_up_headers(self) -> None:
        self._header_timer = None
        self._refuse(describe_status(408, "no whole request came in time"))

    def _refuse(self, error: ApiError) -> None:
        """Answer without the application, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error.to_response().body
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            reason = STATUS_PHRASES[error.status]
            response = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (response, h11.Data(data=bytes(body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
