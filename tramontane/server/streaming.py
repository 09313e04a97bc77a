"""Server-sent events: an answer while it is written.

The status waits for the first news, so that a request that fails at once gets an honest status. A
later failure is an event with the error, and no [DONE].
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from tramontane.server.body import ClientLeft
from tramontane.server.errors import map_error
from tramontane.server.generation import HEARTBEAT, Generation, Update
from tramontane.server.json_text import dump_json

_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
_COMMENT = b": still working\n\n"
# What the OpenAPI document says of an answer that may be a stream.
STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}
_DONE = b"data: [DONE]\n\n"


class ChunkWriter(Protocol):
    """Turns news into the chunks of one interface."""

    def begin(self) -> list[dict[str, Any]]:
        """Before any news."""
        ...

    def write(self, updates: list[Update]) -> list[dict[str, Any]]:
        """Of these news."""
        ...

    def finish(self) -> list[dict[str, Any]]:
        """After the last."""
        ...


async def open_stream(
    generation: Generation, writer: ChunkWriter, *, heartbeat: float, headers: Mapping[str, str]
) -> "EventStream":
    """Wait for the first news, or for the first heartbeat. Raises as Generation does."""
    await generation.__aenter__()
    news = generation.iterate(heartbeat=heartbeat)
    try:
        first = await anext(news)
    except BaseException:
        await generation.__aexit__()
        raise
    return EventStream(generation, writer, first=first, rest=news, headers=headers)


class EventStream(Response):
    """The answer as a stream. Whatever ends it, the engine is told."""

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, writer: ChunkWriter, *, first: list[Update],
        rest: AsyncIterator[list[Update]], headers: Mapping[str, str],
    ) -> None:  # fmt: skip
        super().__init__(headers={**_HEADERS, **headers})
        del self.headers["content-length"]
        self._generation, self._writer = generation, writer
        self._first, self._rest = first, rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""

        async def write(body: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            await write(_format(self._writer.begin()) + self._format_news(self._first))
            async for updates in self._rest:
                if body := self._format_news(updates):
                    await write(body)
            await write(_format(self._writer.finish()) + _DONE, more=False)
        except ClientLeft:
            raise
        except Exception as error:  # headers are out: the error can only be an event
            await write(_format([map_error(error).to_body()]), more=False)
        finally:
            await self._generation.__aexit__()

    def _format_news(self, updates: list[Update]) -> bytes:
        return _COMMENT if updates is HEARTBEAT else _format(self._writer.write(updates))


def _format(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(b"data: " + dump_json(chunk) + b"\n\n" for chunk in chunks)
