"""The engine for a server: a thread of its own runs it, and each request is an async stream.

Requests go to the thread through a queue, what comes out goes back to the event loop that asked,
all of a pass at once. Only the thread touches the engine.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Self

from tramontane.engine.completion import ChoiceUpdate
from tramontane.engine.constraint import Constraint
from tramontane.engine.constraints import MAX_COMPILING
from tramontane.engine.limits import EngineStats
from tramontane.engine.llm import LLM
from tramontane.engine.pulse import Patience, Pulse, build_meter
from tramontane.engine.request import Request
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.sequence import Sequence
from tramontane.engine.served_model import describe_model
from tramontane.errors import EngineError, OverloadError, TramontaneError, UnavailableError
from tramontane.tokenizer.chat import ChatFormat

MAX_QUEUED = 16  # different constraints that are being compiled, or wait for it
_IDLE_SECONDS = 1.0
_PATIENCE = Patience()

_log = logging.getLogger(__name__)


class AnswerStream:
    """What comes out of one request: lists of updates, until each answer has its completion.

    Stop early with `cancel`. Raises the error of a request that never began.
    """

    def __init__(self, request: Request, engine: "AsyncEngine") -> None:
        self.request = request
        self.sequences: list[Sequence] = []
        self.loop = asyncio.get_running_loop()
        self.is_cancelled = False
        self._engine = engine
        self._updates: list[ChoiceUpdate] = []
        self._has_news = asyncio.Event()
        self._num_open = request.params.n
        self._error: TramontaneError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[ChoiceUpdate]:
        while not self._updates:
            if self._error is not None:
                raise self._error
            if self._num_open == 0 or self.is_cancelled:
                raise StopAsyncIteration
            self._has_news.clear()
            await self._has_news.wait()
        updates, self._updates = self._updates, []
        return updates

    def cancel(self) -> None:
        """Nobody waits for the rest; nothing happens if it has ended."""
        if not self.is_cancelled and self._num_open:
            self.is_cancelled = True
            self._has_news.set()
            self._engine._leave(self)

    def push(self, updates: list[ChoiceUpdate]) -> None:
        """More has come (in the event loop's thread)."""
        self._updates += updates
        self._num_open -= sum(update.completion is not None for update in updates)
        self._has_news.set()

    def fail(self, error: TramontaneError) -> None:
        """Nothing more will come (in the event loop's thread)."""
        self._error = error
        self._has_news.set()


class AsyncEngine:
    """Answers the requests of event loops with the engine of `llm`, under the name `name`.

    It takes that engine, so `llm` answers nothing itself any more. `start` it, then `submit`.
    `is_healthy` is False once its thread has died, or hangs in a pass (`engine/pulse.py`).
    """

    def __init__(
        self, llm: LLM, *, name: str | None = None, patience: Patience = _PATIENCE
    ) -> None:
        self.tokenizer = llm.tokenizer
        self.chat_format: ChatFormat | None = llm.find_chat_format()
        self.default_params: SamplingParams = llm.default_params
        self.generation_overrides: Mapping[str, Any] = llm.generation_config.overrides
        self._builder, self._engine = llm.sequences, llm.take_engine()
        self.model = describe_model(
            llm.model,
            name=name or llm.origin,
            vocab_size=llm.tokenizer.vocab_size,
            max_seq_len=min(llm.sequences.max_seq_len, self._engine.longest),
        )
        self.cache_config: Mapping[str, Any] = self._engine.describe_cache()
        self._patience = patience
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._inbound: set[AnswerStream] = set()  # submitted, not yet known to the engine
        self._compilers = ThreadPoolExecutor(MAX_COMPILING, thread_name_prefix="constraints")
        self._stream_of: dict[Sequence, AnswerStream] = {}
        self._streams: set[AnswerStream] = set()
        self._thread: threading.Thread | None = None
        self._is_accepting = False
        self._is_stopping = False
        self._pulse: Pulse | None = None

    def start(self) -> None:
        """Begin to take requests."""
        assert self._thread is None, "started twice"
        self._is_accepting = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def is_healthy(self) -> bool:
        """Whether a request that is sent now has a chance."""
        is_alive = self._thread is not None and self._thread.is_alive()
        return is_alive and not (self._pulse is not None and self._pulse.is_hanging())

    def get_stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self._engine.get_stats()

    def submit(self, request: Request) -> AnswerStream:
        """Send a request, in the thread of a running event loop.

        Raises RequestError, ContextError, CapacityError (it can never fit), OverloadError (too many
        wait) or UnavailableError at once. What is wrong with a constraint comes from the stream:
        it is compiled elsewhere, because that takes its time.
        """
        if not (self._is_accepting and self.is_healthy()):
            raise UnavailableError("the engine takes no requests: it has stopped, or is about to")
        self._require_place()
        self._require_compiler(request.params.constraint)
        self._builder.check(request)
        stream = AnswerStream(request, self)
        self._inbound.add(stream)
        if request.params.constraint is not None:
            self._compilers.submit(self._build, stream)
            return stream
        try:
            sequences = self._builder.build(request)
            self._engine.require_room(sequences[0])
        except TramontaneError:
            self._inbound.discard(stream)
            raise
        stream.sequences = sequences
        self._tell(self._add, stream)
        return stream

    async def drain(self, seconds: float) -> None:
        """Take no more requests; let the running ones end, for so long, then end the rest."""
        self._is_accepting = False
        until = time.monotonic() + seconds
        while self._has_work() and self.is_healthy() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self._commands.put(self._end_all)
        until = time.monotonic() + 2
        while self._has_work() and self.is_healthy() and time.monotonic() < until:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End the thread after the pass it runs; requests that are left get an error."""
        self._is_accepting = False
        self._is_stopping = True
        self._commands.put(lambda: None)
        self._compilers.shutdown(wait=False, cancel_futures=True)
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _require_place(self) -> None:
        most = self._engine.limits.max_waiting
        num_waiting = self._engine.num_waiting + len(self._inbound)
        if most is not None and num_waiting >= most:
            raise OverloadError(
                f"{num_waiting} requests wait, which is as many as may; try again later"
            )

    def _require_compiler(self, constraint: Constraint | None) -> None:
        """So that nobody's constraint waits for long, and what waits takes no place of others."""
        if constraint is None:
            return
        waiting = {s.request.params.constraint for s in list(self._inbound) if not s.sequences}
        if constraint not in waiting and len(waiting - {None}) >= MAX_QUEUED:
            raise OverloadError(
                f"{MAX_QUEUED} other constraints wait to be compiled; send the request again later"
            )

    def _has_work(self) -> bool:
        return bool(self._streams or self._inbound)

    def _tell(self, function: Callable[[AnswerStream], None], stream: AnswerStream) -> None:
        self._commands.put(lambda: function(stream))

    def _leave(self, stream: AnswerStream) -> None:
        self._inbound.discard(stream)  # its constraint waits no longer
        self._tell(self._end, stream)

    def _build(self, stream: AnswerStream) -> None:
        """In a compilers' thread: build the sequences of a request with a constraint."""
        if stream.is_cancelled:
            return
        try:
            sequences = self._builder.build(stream.request)
            self._engine.require_room(sequences[0])
        except Exception as error:  # the caller's to see, whatever it is
            if not isinstance(error, TramontaneError):
                _log.error("a request failed", exc_info=error)
                error = EngineError(f"a constraint could not be compiled ({error})")
            self._inbound.discard(stream)
            self._call(stream, stream.fail, error)
            return
        stream.sequences = sequences
        self._tell(self._add, stream)

    # All below run in the engine's thread.

    def _run(self) -> None:
        self._pulse = pulse = Pulse(self._patience, build_meter())
        try:
            while not self._is_stopping:
                self._obey(pulse, is_idle=self._engine.num_unfinished == 0)
                pulse.beat()
                self._deliver(self._engine.step())
            reason = "the engine has stopped"
        except BaseException as error:
            _log.critical("the engine's thread ends", exc_info=error)
            reason = f"the engine has died ({type(error).__name__}: {error})"
        finally:
            self._is_accepting = False
        for stream in [*self._streams, *self._inbound]:
            self._call(stream, stream.fail, UnavailableError(reason))

    def _obey(self, pulse: Pulse, *, is_idle: bool) -> None:
        """Do what was asked; if there is nothing to run, wait for it."""
        try:
            if is_idle:
                pulse.rest()
                command = self._commands.get(timeout=_IDLE_SECONDS)
                pulse.beat()
                command()
            while True:
                self._commands.get_nowait()()
        except Empty:
            pass

    def _add(self, stream: AnswerStream) -> None:
        self._inbound.discard(stream)
        if stream.is_cancelled:
            return
        self._streams.add(stream)
        for sequence in stream.sequences:
            self._stream_of[sequence] = stream
        try:
            self._engine.add(stream.sequences[0])
        except TramontaneError as error:
            self._forget(stream)
            self._call(stream, stream.fail, error)

    def _end(self, stream: AnswerStream) -> None:
        """Abort what is left of a request."""
        for sequence in stream.sequences:
            self._engine.abort(sequence)
        self._forget(stream)

    def _end_all(self) -> None:
        for stream in list(self._streams):
            unfinished = [s for s in stream.sequences if not s.is_finished]
            for sequence in unfinished:
                self._engine.abort(sequence)
            self._deliver(unfinished)

    def _forget(self, stream: AnswerStream) -> None:
        self._streams.discard(stream)
        for sequence in stream.sequences:
            self._stream_of.pop(sequence, None)

    def _deliver(self, touched: list[Sequence]) -> None:
        """Send what is new to the event loops, with one call to each."""
        news: dict[asyncio.AbstractEventLoop, list[tuple[AnswerStream, list[ChoiceUpdate]]]] = {}
        for sequence in touched:
            stream = self._stream_of.get(sequence)
            if stream is None:
                continue
            pieces = sequence.take_pieces(with_experts=stream.request.routing != "none")
            completion = sequence.build_completion() if sequence.is_finished else None
            if completion is not None:
                del self._stream_of[sequence]
                if all(s.is_finished for s in stream.sequences):
                    self._streams.discard(stream)
            if pieces or completion is not None:
                update = ChoiceUpdate(sequence.choice, pieces, completion)
                news.setdefault(stream.loop, []).append((stream, [update]))
        for loop, items in news.items():
            _call_soon(loop, _push_all, items)

    @staticmethod
    def _call(stream: AnswerStream, function: Callable[..., None], *arguments: object) -> None:
        _call_soon(stream.loop, function, *arguments)


def _push_all(items: list[tuple[AnswerStream, list[ChoiceUpdate]]]) -> None:
    for stream, updates in items:
        stream.push(updates)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Call in the loop's thread; of a loop that has closed nobody waits any more."""
    # It may close at any moment; asyncio has no narrower type for that.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args)
