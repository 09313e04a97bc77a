"""An engine without a model, for tests alone: each token follows from prompt, seed and place.

It keeps the contract of tramontane/server/ports.py, in the event loop instead of a thread.
"""

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.server.byte_tokenizer import ByteTokenizer
from tramontane.engine.completion import (
    ChoiceUpdate,
    Completion,
    TextPiece,
    Timings,
    TokenLogprob,
)
from tramontane.engine.request import Request
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.text_output import TextOutput
from tramontane.errors import ContextError, OverloadError, TramontaneError, UnavailableError
from tramontane.tokenizer.chat import ChatFormat
from tramontane.tokenizer.stream import IncrementalDecoder

L, E, K, D = 2, 4, 2, 16


def make_facts(**changes: Any) -> SimpleNamespace:
    values = {
        "name": "fake", "created": 1_700_000_000, "max_seq_len": 512,
        "vocab_size": ByteTokenizer().vocab_size, "n_layers": L, "dim": D, "num_experts": E,
        "num_experts_per_tok": K, "layer_experts": (E,) * L, "num_parameters": 10_000,
        "num_active_parameters": 6_000, "num_expert_parameters": 1_000,
        "weight_bytes_per_expert": 2_000,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@dataclass
class FakeEngine:
    """`seconds_per_token` slows it down; `failures` maps a token's place to what happens there."""

    chat_format: ChatFormat | None = None
    seconds_per_token: float = 0.0
    max_running: int = 1000
    max_waiting: int = 1000
    generation_overrides: dict[str, Any] = field(default_factory=dict)
    failures: dict[int, Exception] = field(default_factory=dict)
    refusal: TramontaneError | None = None
    is_alive: bool = True
    keeps_requests: bool = True  # for tests that look at them; else the last alone
    model: SimpleNamespace = field(default_factory=make_facts)
    cache_config: dict[str, Any] = field(
        default_factory=lambda: {"block_size": 16, "sliding_window": None}
    )

    def __post_init__(self) -> None:
        self.tokenizer = ByteTokenizer()
        self.default_params = SamplingParams(**self.generation_overrides)
        self.requests: list[Request] = []
        self.num_ended = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.num_waiting = 0
        self.running: set[FakeStream] = set()
        self.is_draining = False
        self.free = asyncio.Condition()

    def submit(self, request: Request) -> "FakeStream":
        if self.refusal is not None:
            raise self.refusal
        if self.is_draining:
            raise UnavailableError("the engine takes no more requests")
        if len(request.prompt_ids) + request.params.max_tokens > self.model.max_seq_len:
            raise ContextError("the prompt does not fit")
        if len(self.running) >= self.max_running and self.num_waiting >= self.max_waiting:
            raise OverloadError(f"{self.num_waiting} requests wait, as many as may")
        if not self.keeps_requests:
            self.requests.clear()
        self.requests.append(request)
        self.num_waiting += 1
        return FakeStream(self, request)

    def get_stats(self) -> SimpleNamespace:
        tokens = sum(len(request.prompt_ids) for request in self.requests)
        return SimpleNamespace(
            num_running=len(self.running), num_waiting=self.num_waiting, kv_cache_usage=0.25,
            prefix_cache_queries=tokens, prefix_cache_hits=0, num_preemptions=0,
            num_prompt_tokens=tokens, num_generation_tokens=7, pass_sizes={1: 5, 9: 2, 20_000: 1},
            expert_tokens=[[1, 2, 3, 4], [10, 0, 0, 0]],
        )  # fmt: skip

    def is_healthy(self) -> bool:
        return self.is_alive

    def start(self) -> None:
        pass

    async def drain(self, seconds: float) -> None:
        self.is_draining = True
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for stream in list(self.running):
            stream.cancel()

    def stop(self) -> None:
        self.is_alive = False

    @property
    def num_unfinished(self) -> int:
        """What must be 0 at idle."""
        return len(self.running) + self.num_waiting


class FakeStream:
    """The answers to one request."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self._engine, self._request = engine, request
        self._updates: asyncio.Queue[list[ChoiceUpdate] | Exception] = asyncio.Queue()
        self._num_open = request.params.n
        self._is_cancelled = False
        self._task = asyncio.create_task(self._run())

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> list[ChoiceUpdate]:
        if not self._num_open:
            raise StopAsyncIteration
        updates = await self._updates.get()
        if isinstance(updates, Exception):
            raise updates
        self._num_open -= sum(update.completion is not None for update in updates)
        return updates

    def cancel(self) -> None:
        self._is_cancelled = True

    async def _run(self) -> None:
        engine = self._engine
        async with engine.free:
            await engine.free.wait_for(lambda: len(engine.running) < engine.max_running)
            engine.num_waiting -= 1
            engine.running.add(self)
        choices = [_Choice(engine, self._request, i) for i in range(self._request.params.n)]
        try:
            while any(choice.is_open for choice in choices):
                await asyncio.sleep(engine.seconds_per_token)
                while not engine.is_alive:
                    await asyncio.sleep(0.01)
                if self._is_cancelled:
                    updates = [choice.end("abort") for choice in choices if choice.is_open]
                else:
                    updates = [choice.step() for choice in choices if choice.is_open]
                self._updates.put_nowait(updates)
        except Exception as error:
            self._updates.put_nowait(error)
        finally:
            async with engine.free:
                engine.running.discard(self)
                engine.free.notify_all()


class _Choice:
    """One answer."""

    def __init__(self, engine: FakeEngine, request: Request, index: int) -> None:
        self._engine, self._request, self._index = engine, request, index
        seed = 0 if request.params.seed is None else request.params.seed + index
        self._random = random.Random(repr((tuple(request.prompt_ids), seed)))
        decoder = IncrementalDecoder(engine.tokenizer, starts_text=request.starts_text)
        self._output = TextOutput(decoder, stop=request.params.stop)
        self._num_told = 0  # tokens whose text has become certain
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self.is_open = True

    def step(self) -> ChoiceUpdate:
        params = self._request.params
        if params.max_tokens == 0:
            return self.end("length")
        failure = self._engine.failures.get(len(self._ids))
        if isinstance(failure, TramontaneError):
            return self.end("error", failure)
        if failure is not None:
            raise failure
        token_id = 3 + self._random.choice(b"abcdefghijklmnopqrstuvwxyz     .,")
        self._ids.append(token_id)
        texts = self._output.push(token_id)
        if self._output.is_stopped:
            return self.end("stop", texts=texts)
        if len(self._ids) == params.max_tokens:
            return self.end("length", texts=texts + self._output.finish())
        return ChoiceUpdate(self._index, [self._make_piece(text) for text in texts])

    def end(
        self, reason: Any, error: TramontaneError | None = None, *, texts: Sequence[str] = ()
    ) -> ChoiceUpdate:
        self.is_open = False
        self._engine.num_ended[reason] += 1
        pieces = [self._make_piece(text) for text in texts]
        return ChoiceUpdate(self._index, pieces, self._build_completion(reason, error))

    def _make_piece(self, text: str) -> TextPiece:
        self._texts.append(text)
        token_id = self._ids[self._num_told]
        at = len(self._request.prompt_ids) + self._num_told
        self._num_told += 1
        logprob = None
        if self._request.params.logprobs is not None:
            logprob = make_logprob(token_id, self._request.params.logprobs)
            self._logprobs.append(logprob)
        if self._request.routing == "none":
            return TextPiece(text, token_id, logprob=logprob)
        weights = np.tile(np.float32([0.75, 0.25]), (L, 1))
        return TextPiece(text, token_id, make_experts(at), weights, logprob)

    def _build_completion(self, reason: Any, error: TramontaneError | None) -> Completion:
        request, params = self._request, self._request.params
        prompt_ids = list(request.prompt_ids)
        start = 0 if request.routing == "all" else len(prompt_ids)
        experts = None
        if request.routing != "none":
            places = range(start, len(prompt_ids) + max(0, len(self._ids) - 1))
            experts = np.array([make_experts(at) for at in places], np.int16).reshape(-1, L, K)
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            number = params.prompt_logprobs
            rest = [make_logprob(token_id, number) for token_id in prompt_ids[1:]]
            prompt_logprobs = (None, *rest)
        return Completion(
            text="".join(self._texts), token_ids=tuple(self._ids), finish_reason=reason,
            num_prompt_tokens=len(prompt_ids), timings=Timings(0.01, 0.02, 0.005),
            selected_experts=experts,
            expert_weights=None if experts is None else np.full(experts.shape, 0.5, np.float32),
            routing_start=start, index=self._index,
            stop_reason=self._output.found_stop,
            logprobs=tuple(self._logprobs) if params.logprobs is not None else None,
            prompt_logprobs=prompt_logprobs,
            embedding=make_embedding(prompt_ids) if request.wants_embedding else None,
            error=error,
        )  # fmt: skip


def make_experts(at: int) -> np.ndarray:
    """(L, K): the experts of the token at this place."""
    return np.array([[(at + layer) % E, (at + layer + 1) % E] for layer in range(L)], np.int16)


def make_logprob(token_id: int, number: int) -> TokenLogprob:
    """The token itself is the likeliest."""
    top = tuple((token_id + i, -0.5 - i) for i in range(number))
    return TokenLogprob(token_id, -0.5, top)


def make_embedding(ids: list[int]) -> np.ndarray:
    return np.random.default_rng(sum(ids)).standard_normal(D).astype(np.float32)


def read_words(engine: FakeEngine) -> Iterator[str]:
    """What the engine was asked, as text."""
    return (engine.tokenizer.decode(list(r.prompt_ids)) for r in engine.requests)
