"""The answer to a request for text, whole or as a stream: what chat and completions end with."""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi.responses import Response

from tramontane.server.exchange import Exchange
from tramontane.server.generation import Answer
from tramontane.server.json_text import JsonResponse
from tramontane.server.streaming import ChunkWriter, open_stream


async def reply(
    exchange: Exchange,
    build_writer: Callable[[Exchange], ChunkWriter],
    build_answer: Callable[[Exchange, Sequence[Answer]], dict[str, Any]],
) -> Response:
    """Ask the engine; `build_writer` is for a stream, `build_answer` for a whole answer.

    Raises as Generation does.
    """
    headers, generation = exchange.build_headers(), exchange.generate()
    if exchange.fields.stream:
        return await open_stream(
            generation, build_writer(exchange), heartbeat=exchange.state.settings.heartbeat,
            headers=headers,
        )  # fmt: skip
    async with generation:
        answers = await generation.collect()
    return JsonResponse(build_answer(exchange, answers), headers=headers)
