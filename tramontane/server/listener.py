"""The server's life: listen, load the model, answer, and end in order.

It listens before the model is there, so that /health can say so. SIGTERM or Ctrl-C ends it: no new
requests, those that run have `shutdown_timeout` seconds; a second signal ends it at once.
"""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import uvicorn

from tramontane.errors import ConfigError
from tramontane.server.app import build_app
from tramontane.server.connection import ConnectionConfig
from tramontane.server.ports import ServingEngine
from tramontane.server.settings import ServerSettings
from tramontane.server.state import ServerState

_BACKLOG = 1024
_LAST_WORDS = 1.0  # seconds
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

LoadEngine = Callable[[], ServingEngine]


class HttpServer(uvicorn.Server):
    """uvicorn without its own answer to signals."""

    def capture_signals(self) -> nullcontext[None]:  # type: ignore[override]
        """Nothing: `run_server` handles them, as it drains the engine first."""
        return nullcontext()


def open_socket(settings: ServerSettings) -> socket.socket:
    """The listening socket. Raises ConfigError, naming the address."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port} ({error.strerror}): choose "
            f"another with --host and --port"
        ) from error


async def run_server(
    state: ServerState, load: LoadEngine, listening: socket.socket, *,
    on_ready: Callable[[ServingEngine], None] = lambda engine: None,
) -> None:  # fmt: skip
    """Until a signal. `load` runs in a thread; what it raises ends the server and is raised."""
    server = HttpServer(ConnectionConfig(build_app(state), state.settings))
    with _catch_signals() as stopping:
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            engine = await _wait_for_engine(load, stopping)
            if engine is not None:
                engine.start()
                state.attach(engine)
                on_ready(engine)
                await stopping.wait()
                await stop_engine(state, engine)
        finally:
            server.should_exit = True
            await serving


async def stop_engine(state: ServerState, engine: ServingEngine) -> None:
    """New requests are refused, /health says so; those that run may end, and then must."""
    state.phase = "draining"
    await engine.drain(state.settings.shutdown_timeout)
    for _ in range(round(_LAST_WORDS / 0.01)):  # those that were cut off are told so
        if not state.num_waiting:
            break
        await asyncio.sleep(0.01)
    state.fail_waiting("the server is stopping; this answer was cut off")
    engine.stop()


async def _wait_for_engine(load: LoadEngine, stopping: asyncio.Event) -> ServingEngine | None:
    """The engine, or None if a signal came first; the thread then dies with the process."""
    loading = _start_loading(load)
    stopped = asyncio.create_task(stopping.wait())
    either: set[asyncio.Future[Any]] = {loading, stopped}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    return loading.result() if loading.done() else None


def _start_loading(load: LoadEngine) -> "asyncio.Future[ServingEngine]":
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ServingEngine] = loop.create_future()

    def settle(engine: ServingEngine | None, error: Exception | None) -> None:
        if future.done():
            return
        if engine is None:
            future.set_exception(error or AssertionError("no engine and no error"))
        else:
            future.set_result(engine)

    def work() -> None:
        engine, failure = None, None
        try:
            engine = load()
        except Exception as error:  # handed to the event loop, which raises it
            failure = error
        loop.call_soon_threadsafe(settle, engine, failure)

    threading.Thread(target=work, name="load-model", daemon=True).start()
    return future


@contextmanager
def _catch_signals() -> Iterator[asyncio.Event]:
    """The first sets the event; the second leaves at once, whatever the engine is doing."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()

    def note(number: int) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, note, number)
    try:
        yield stopping
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
