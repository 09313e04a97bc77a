"""The body of a request, read whole before anything looks at it: bounded in size and in time."""

import asyncio
from contextlib import suppress

from starlette.types import Message, Receive

from tramontane.server.access import Headers, get_all
from tramontane.server.errors import ApiError, describe_status

_MAX_SKIPPED = 64 * 2**20
_SKIP_SECONDS = 2.0


class ClientLeft(Exception):
    """The other end has closed the connection; nobody waits for an answer."""


async def read_body(receive: Receive, headers: Headers, *, max_bytes: int, seconds: float) -> bytes:
    """The whole body. Raises ApiError 400, 408 or 413, and ClientLeft."""
    declared = get_all(headers, b"content-length")
    if declared and declared[0].isdigit() and int(declared[0]) > max_bytes:
        if not get_all(headers, b"expect"):  # who asks before he sends is told at once
            await _skip(receive)
        raise _too_large(max_bytes)
    if get_all(headers, b"content-encoding"):
        raise describe_status(415, "send the body as it is, without Content-Encoding")
    try:
        async with asyncio.timeout(seconds):
            return await _read(receive, max_bytes)
    except TimeoutError:
        message = f"the body did not arrive within {seconds:g} seconds"
        raise ApiError(
            408, message, type="invalid_request_error", code="request_timeout",
            headers={"connection": "close"},
        ) from None  # fmt: skip


async def _read(receive: Receive, max_bytes: int) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            await _skip(receive)
            raise _too_large(max_bytes)
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


async def _skip(receive: Receive) -> None:
    """Let the rest of a body pass for a while: most clients send all of it before they read.

    If the connection were closed meanwhile, they would see a broken one and not the answer.
    """
    size, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(_SKIP_SECONDS):
            while more and size < _MAX_SKIPPED:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, and then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than the {max_bytes} bytes that this server reads",
        type="invalid_request_error", code="request_too_large", headers={"connection": "close"},
    )  # fmt: skip
