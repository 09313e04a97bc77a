"""Puts the application together: routes, the gate around them, errors in one shape.

state = ServerState(ServerSettings())
app = build_app(state)
state.attach(engine)
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException

from tramontane import __version__
from tramontane.errors import TramontaneError
from tramontane.server import chat, completions, embeddings, health, models, tokenize
from tramontane.server.errors import ApiError, describe_status, map_error
from tramontane.server.gate import Gate
from tramontane.server.page import build_page_router, list_open_paths, load_page
from tramontane.server.protocol.answers import ErrorAnswer
from tramontane.server.state import ServerState
from tramontane.server.validation import describe_validation

# No telemetry, whatever the environment says: the server opens no connection.
_NO_TELEMETRY = TelemetryConfig(auto_configure=False, tracing=False, metrics=False, logs=False)
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorAnswer, "description": "Any error"}
}


def build_app(state: ServerState) -> FastAPI:
    """The ASGI application. Its engine may be attached to `state` later."""
    app = FastAPI(
        title="tramontane",
        version=__version__,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_run_watcher,
        responses=_ERRORS,
        telemetry=_NO_TELEMETRY,
    )
    app.state.server = state
    files = load_page()
    for module in (chat, completions, embeddings, models, tokenize, health):
        app.include_router(module.router)
    app.include_router(build_page_router(files))
    _install_errors(app)
    app.add_middleware(
        Gate, settings=state.settings, limits=state.limits, open_paths=list_open_paths(files)
    )
    return app


@asynccontextmanager
async def _run_watcher(app: FastAPI) -> AsyncIterator[None]:
    watcher = asyncio.create_task(app.state.server.watch_engine())
    try:
        yield
    finally:
        watcher.cancel()


def _install_errors(app: FastAPI) -> None:
    """Every error of a route leaves as one shape. ClientLeft passes on to the gate."""

    async def answer(_: Request, error: Exception) -> Response:
        return map_error(error).to_response()

    async def answer_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError), error
        return describe_validation(error).to_response()

    async def answer_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), error
        return describe_status(error.status_code, error.detail, headers=error.headers).to_response()

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(TramontaneError, answer)
    app.add_exception_handler(RequestValidationError, answer_validation)
    app.add_exception_handler(HTTPException, answer_http)
