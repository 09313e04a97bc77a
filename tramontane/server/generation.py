"""Asks the engine, and brings its answers together, until they are done or nobody waits for them.

A request's prompts run beside each other; whatever ends the wait (the client left, the engine died,
one answer failed) ends all of them, so that none stays in the engine.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Self

from starlette.types import Receive

from tramontane.engine.completion import ChoiceUpdate, Completion, TextPiece
from tramontane.engine.request import Request
from tramontane.errors import (
    CapacityError,
    EngineError,
    OverloadError,
    UnavailableError,
)
from tramontane.server.body import ClientLeft
from tramontane.server.errors import blame, map_error, never_fits
from tramontane.server.ports import AnswerStream, ServingEngine
from tramontane.server.state import ServerState

HEARTBEAT: list["Update"] = []  # nothing new: a stream may send a sign of life


class Update(NamedTuple):
    """News of answer number `answer` of the request, all its prompts counted."""

    answer: int
    pieces: list[TextPiece]
    completion: Completion | None


class Answer(NamedTuple):
    """A finished answer and the pieces that it came in."""

    completion: Completion
    pieces: list[TextPiece]


class Generation:
    """The answers to the requests of one HTTP request; use it in `async with`.

    Raises ApiError on entering if the engine refuses one of them; `param` is then at fault, and of
    what it refuses later `constraint_param`.
    """

    def __init__(
        self, state: ServerState, requests: Sequence[Request], *,
        receive: Receive, started_at: float, param: str, constraint_param: str | None = None,
    ) -> None:  # fmt: skip
        self._state, self._requests, self._receive = state, requests, receive
        self._started_at, self._param = started_at, param
        self._constraint_param = constraint_param
        self._streams: list[AnswerStream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._news: asyncio.Queue[list[Update] | Exception] = asyncio.Queue()
        self._num_open = sum(request.params.n for request in requests)
        self._token_times: dict[int, float] = {}  # of each answer's last token
        self._last_news = time.perf_counter()

    async def __aenter__(self) -> Self:
        engine = self._state.engine
        try:
            for request in self._requests:
                self._streams.append(_submit(engine, request, self._param))
        except Exception:
            self._cancel()
            raise
        first = 0
        for stream, request in zip(self._streams, self._requests, strict=True):
            self._tasks.append(asyncio.create_task(self._pump(stream, first, request.params.n)))
            self._state.metrics.note_request(request.params)
            first += request.params.n
        self._tasks.append(asyncio.create_task(self._watch_client()))
        self._state.add_waiting(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._state.remove_waiting(self)
        if self._num_open:
            self._cancel()
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()  # a cancelled task keeps its frames, and they this generation

    def fail(self, error: Exception) -> None:
        """End the wait with this error."""
        self._news.put_nowait(map_error(error))

    async def iterate(self, *, heartbeat: float | None = None) -> AsyncIterator[list[Update]]:
        """News as they come, HEARTBEAT after so many seconds without any.

        Raises ApiError if an answer fails or the engine is lost, and ClientLeft.
        """
        if heartbeat is not None:
            self._tasks.append(asyncio.create_task(self._beat(heartbeat)))
        while self._num_open:  # once all answers have ended, no other news matters
            news = await self._news.get()
            if isinstance(news, Exception):
                raise news
            self._last_news = time.perf_counter()
            for update in news:
                self._note(update)
            yield news

    async def collect(self) -> list[Answer]:
        """All answers, whole. Raises as `iterate` does."""
        pieces: dict[int, list[TextPiece]] = {}
        completions: dict[int, Completion] = {}
        async for updates in self.iterate():
            for update in updates:
                pieces.setdefault(update.answer, []).extend(update.pieces)
                if update.completion is not None:
                    completions[update.answer] = update.completion
        return [Answer(completions[index], pieces[index]) for index in sorted(completions)]

    async def _pump(self, stream: AnswerStream, first: int, num_answers: int) -> None:
        """Hand on what one prompt's answers bring."""
        num_ended = 0
        try:
            async for updates in stream:
                num_ended += sum(update.completion is not None for update in updates)
                self._news.put_nowait([_number(update, first) for update in updates])
            if num_ended < num_answers:
                raise EngineError("the engine left an answer unfinished")
        except CapacityError as error:
            self._news.put_nowait(never_fits(error, self._param))
        except Exception as error:  # any failure of the engine is the request's, and ends it
            self._news.put_nowait(map_error(error, param=self._constraint_param))

    async def _beat(self, seconds: float) -> None:
        """One timer for a stream, not one for each token."""
        while True:
            silence = time.perf_counter() - self._last_news
            if silence >= seconds:
                self._news.put_nowait(HEARTBEAT)
                self._last_news, silence = time.perf_counter(), 0.0
            await asyncio.sleep(seconds - silence)

    async def _watch_client(self) -> None:
        """Streaming or not, an answer that nobody waits for is not computed."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._news.put_nowait(ClientLeft())

    def _note(self, update: Update) -> None:
        """Measure, and see whether an answer has ended. Raises ApiError if it failed."""
        now = time.perf_counter()
        metrics, before = self._state.metrics, self._token_times.get(update.answer)
        for _ in update.pieces:
            if before is None:
                metrics.observe("time_to_first_token_seconds", now - self._started_at)
            else:
                metrics.observe("inter_token_latency_seconds", now - before)
            before = self._token_times[update.answer] = now
        if update.pieces:
            self._state.cost_meter.note_tokens(len(update.pieces))
        if update.completion is not None:
            self._num_open -= 1
            metrics.note_completion(update.completion, seconds=now - self._started_at)
            _require_success(update.completion)

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()


def _submit(engine: ServingEngine, request: Request, param: str) -> AnswerStream:
    with blame(param):
        try:
            return engine.submit(request)
        except OverloadError:
            raise
        except CapacityError as error:
            raise never_fits(error, param) from error


def _number(update: ChoiceUpdate, first: int) -> Update:
    return Update(first + update.choice, update.pieces, update.completion)


def _require_success(completion: Completion) -> None:
    """An answer that was cut off by the server is an error, not a short answer."""
    if completion.finish_reason == "error":
        raise map_error(completion.error or EngineError("the engine failed at this request"))
    if completion.finish_reason == "abort":
        raise map_error(UnavailableError("the server is stopping; this answer was cut off"))
