"""A real server over a fake or a real engine, in a thread of the test's process."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI

from tests.server.fake_engine import FakeEngine
from tramontane import LLM
from tramontane.engine.async_engine import AsyncEngine
from tramontane.engine.pulse import Patience
from tramontane.server.app import build_app
from tramontane.server.connection import ConnectionConfig
from tramontane.server.listener import HttpServer, open_socket
from tramontane.server.settings import ServerSettings
from tramontane.server.state import ServerState

_PATIENCE = Patience()


class LiveServer:
    """Its address, what it is made of, and a client without and with a key."""

    def __init__(self, app: FastAPI, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.app, self.port, self.loop = app, port, loop
        self.state: ServerState = app.state.server
        state = self.state
        self.url = f"http://127.0.0.1:{port}"
        key = state.settings.api_keys[0] if state.settings.api_keys else None
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.client = httpx2.Client(base_url=self.url, headers=headers, timeout=30)

    @property
    def engine(self) -> FakeEngine:
        return self.state.engine

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """In the server's thread."""

        async def run() -> Any:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def wait_idle(self, seconds: float = 10) -> None:
        """Nothing runs or waits in the engine, and nobody waits for it."""
        end = time.monotonic() + seconds
        while (left := self._count_unfinished()) or self.state.num_waiting:
            assert time.monotonic() < end, (left, self.state.num_waiting)
            time.sleep(0.005)

    def _count_unfinished(self) -> int:
        stats = self.engine.get_stats()
        return stats.num_running + stats.num_waiting

    def post(self, path: str, **body: Any) -> httpx2.Response:
        headers = {"content-type": "application/json"}
        return self.client.post(path, content=json.dumps(body), headers=headers)

    def chat(self, text: str = "Hello", **fields: Any) -> httpx2.Response:
        messages = [{"role": "user", "content": text}]
        body = {"messages": messages, "max_tokens": 8, **fields}
        return self.post("/v1/chat/completions", **body)

    def complete(self, prompt: Any = "Hello", **fields: Any) -> httpx2.Response:
        return self.post("/v1/completions", **{"prompt": prompt, **fields})


@contextmanager
def run_real(
    folder: Path, *, patience: Patience = _PATIENCE, limits: dict[str, int] | None = None,
    **settings: Any,
) -> Iterator[LiveServer]:  # fmt: skip
    """Over the model of this folder."""
    llm = LLM(folder, **(limits or {}))
    engine = AsyncEngine(llm, name="real", patience=patience)
    engine.start()
    try:
        with run_live(lambda: engine, **settings) as live:
            yield live
            live.wait_idle()
    finally:
        engine.stop()
        llm.sequences.close()


@contextmanager
def run_live(
    make_engine: Callable[[], FakeEngine | AsyncEngine] | None = FakeEngine, **settings: Any
) -> Iterator[LiveServer]:
    """Without `make_engine` the model never loads."""
    state = ServerState(ServerSettings(port=0, **settings))
    listening = open_socket(state.settings)
    app = build_app(state)
    server = HttpServer(ConnectionConfig(app, state.settings))
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        if make_engine is not None:
            state.attach(make_engine())
        loops.append(asyncio.get_running_loop())
        started.set()
        await server.serve(sockets=[listening])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(20)
    live = LiveServer(app, listening.getsockname()[1], loops[0])
    try:
        yield live
    finally:
        live.client.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
