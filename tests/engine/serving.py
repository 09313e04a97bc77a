"""The engine behind a server, around a model of toy size, and what is read from it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tramontane import LLM, SamplingParams
from tramontane.engine.async_engine import AnswerStream, AsyncEngine
from tramontane.engine.completion import Completion
from tramontane.engine.pulse import Patience

GREEDY = SamplingParams(temperature=0, max_tokens=16)
_PATIENCE = Patience()


@asynccontextmanager
async def serve(
    folder: Path, *, patience: Patience = _PATIENCE, **limits: int
) -> AsyncIterator[tuple[LLM, AsyncEngine]]:
    llm = LLM(folder, **limits)
    engine = AsyncEngine(llm, patience=patience)
    engine.start()
    try:
        yield llm, engine
    finally:
        engine.stop()
        llm.sequences.close()


async def read(stream: AnswerStream) -> tuple[list[str], list[Completion]]:
    """The text that came for each answer, and the answers."""
    texts = [""] * stream.request.params.n
    completions = []
    async for updates in stream:
        for choice, pieces, completion in updates:
            texts[choice] += "".join(piece.text for piece in pieces)
            if completion is not None:
                completions.append(completion)
    return texts, sorted(completions, key=lambda c: c.index)


async def settle(engine: AsyncEngine) -> None:
    """Wait until nothing runs, and see that nothing is held."""
    until, inner = time.monotonic() + 10, engine._engine
    while inner.num_unfinished or inner.num_cache_bytes:
        assert time.monotonic() < until, inner.get_stats()
        await asyncio.sleep(0.01)
    inner.check_integrity()
