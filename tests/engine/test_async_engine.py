"""The engine behind a server: streams, leaving, limits, health (rows A04, A14, A16, E10 - E17)."""

import asyncio
import json
import random
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.engine.sequences import count_pool_bytes
from tests.model_folder import save_tiny_model
from tramontane import LLM, SamplingParams
from tramontane.engine.async_engine import AnswerStream, AsyncEngine
from tramontane.engine.completion import Completion
from tramontane.engine.constraint import Constraint
from tramontane.engine.engine import Engine
from tramontane.engine.request import Request
from tramontane.errors import (
    CapacityError,
    ContextError,
    EngineError,
    OverloadError,
    RequestError,
    UnavailableError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@asynccontextmanager
async def serve(folder, *, hang_seconds=60.0, **limits) -> AsyncIterator[tuple[LLM, AsyncEngine]]:
    llm = LLM(folder, **limits)
    engine = AsyncEngine(llm, hang_seconds=hang_seconds)
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


async def settle(llm: LLM) -> None:
    """Wait until nothing runs, and see that nothing is held."""
    until = time.monotonic() + 10
    while llm.engine.num_unfinished or llm.engine.num_cache_bytes:
        assert time.monotonic() < until, llm.engine.get_stats()
        await asyncio.sleep(0.01)
    llm.engine.check_integrity()


def test_200_requests_at_once_are_answered_as_each_alone(folder):
    """A04, A16: and the pieces of each make up its text."""

    async def run():
        async with serve(folder, max_num_seqs=32) as (llm, engine):
            requests = [llm.build_request(f"marker {i} " * (i % 5 + 1), GREEDY) for i in range(200)]
            alone = LLM(folder).run(requests[::20])
            answers = await asyncio.gather(*(read(engine.submit(r)) for r in requests))
            await settle(llm)
            for texts, [completion] in answers:
                assert texts == [completion.text]
            for (_, [completion]), expected in zip(answers[::20], alone, strict=True):
                assert completion.token_ids == expected.token_ids

    asyncio.run(run())


def test_several_answers_come_in_one_stream(folder):
    async def run():
        async with serve(folder) as (llm, engine):
            params = SamplingParams(n=4, seed=3, max_tokens=9)
            texts, completions = await read(engine.submit(llm.build_request("Hello", params)))
            expected = LLM(folder).generate("Hello", params)
            assert texts == [expected.text, *(other.text for other in expected.others)]
            assert [c.index for c in completions] == [0, 1, 2, 3]

    asyncio.run(run())


def test_experts_come_with_each_token(folder):
    async def run():
        async with serve(folder) as (llm, engine):
            request = llm.build_request("Hello", GREEDY, routing="answer")
            pieces = []
            async for updates in engine.submit(request):
                pieces += [piece for update in updates for piece in update.pieces]
            assert len(pieces) == 16
            assert all(p.selected_experts.shape == (2, 2) for p in pieces[:-1])
            assert pieces[-1].selected_experts is None
            whole = LLM(folder).generate("Hello", GREEDY, collect_routing=True)
            expected = whole.selected_experts[whole.num_prompt_tokens :]
            assert [p.selected_experts.tolist() for p in pieces[:-1]] == expected.tolist()

    asyncio.run(run())


@pytest.mark.parametrize("moment", [0, 1, 2, 5])
def test_a_caller_who_leaves_frees_everything(folder, moment):
    """E14: in the queue, in the prompt, while decoding."""

    async def run():
        async with serve(folder, max_num_seqs=4, max_num_batched_tokens=16) as (llm, engine):
            params = SamplingParams(n=2, seed=1, max_tokens=100, ignore_eos=True)
            streams = [engine.submit(llm.build_request("word " * 20, params)) for _ in range(6)]
            for stream in streams:
                for _ in range(moment):
                    await anext(stream)
                stream.cancel()
                stream.cancel()
            await settle(llm)
            assert not engine._streams
            assert not engine._stream_of

    asyncio.run(run())


def test_what_cannot_be_is_refused_at_once(folder):
    """A12 at the engine, A18: too long, too many, unknown ids, more experts than there are."""

    async def run():
        llm = LLM(folder)
        size = count_pool_bytes(llm.model, 4)
        limits = {"kv_cache_memory_bytes": size, "max_waiting": 2, "max_num_seqs": 1}
        async with serve(folder, **limits) as (llm, engine):
            with pytest.raises(ContextError, match=r"300 tokens.*holds 256"):
                engine.submit(Request(prompt_ids=[5] * 300, params=GREEDY))
            with pytest.raises(CapacityError, match=r"holds 64 \(4 blocks\)"):
                engine.submit(Request(prompt_ids=[5] * 60, params=GREEDY))
            with pytest.raises(RequestError, match="token id 5000"):
                engine.submit(Request(prompt_ids=[5000], params=GREEDY))
            many = llm.build_request("Hello", SamplingParams(experts_per_token=9))
            with pytest.raises(RequestError, match="this model has 8 experts"):
                engine.submit(many)
            long = llm.build_request("Hello", SamplingParams(max_tokens=40, ignore_eos=True))
            streams: list[AnswerStream] = []

            def submit_many():
                while len(streams) < 20:
                    streams.append(engine.submit(long))

            with pytest.raises(OverloadError, match="2 requests wait"):
                submit_many()
            for _, [completion] in await asyncio.gather(*map(read, streams)):
                assert completion.num_completion_tokens == 40

    asyncio.run(run())


def test_a_bad_constraint_ends_its_own_request(folder):
    async def run():
        async with serve(folder) as (llm, engine):
            bad = SamplingParams(constraint=Constraint("regex", "(unclosed"))
            good = llm.build_request("Hello", GREEDY)
            streams = [engine.submit(llm.build_request("Hello", bad)), engine.submit(good)]
            with pytest.raises(RequestError, match="regex"):
                await read(streams[0])
            _, [completion] = await read(streams[1])
            assert completion.token_ids == LLM(folder).run([good])[0].token_ids
            await settle(llm)

    asyncio.run(run())


def test_a_constraint_is_kept_to(folder):
    async def run():
        async with serve(folder) as (llm, engine):
            schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                      "additionalProperties": False}  # fmt: skip
            constraint = Constraint("json_schema", json.dumps(schema))
            params = SamplingParams(n=2, seed=1, max_tokens=60, constraint=constraint)
            texts, completions = await read(engine.submit(llm.build_request("Hello", params)))
            assert {c.finish_reason for c in completions} == {"stop"}
            assert all(json.loads(text)["a"] in (1, 2) for text in texts)

    asyncio.run(run())


def test_draining_lets_the_running_end_and_then_ends_the_rest(folder):
    """E15 at the engine."""

    async def run():
        async with serve(folder, max_num_seqs=2) as (llm, engine):
            short = [engine.submit(llm.build_request("Hello", GREEDY)) for _ in range(3)]
            readers = [asyncio.create_task(read(stream)) for stream in short]
            await engine.drain(20)
            assert [c.finish_reason for _, [c] in await asyncio.gather(*readers)] == ["length"] * 3
            with pytest.raises(UnavailableError, match="takes no requests"):
                engine.submit(llm.build_request("Hello", GREEDY))
        async with serve(folder) as (llm, engine):
            endless = SamplingParams(max_tokens=240, ignore_eos=True, n=8)
            readers = [
                asyncio.create_task(read(engine.submit(llm.build_request("Hello", endless))))
                for _ in range(8)
            ]
            await asyncio.sleep(0.05)
            await engine.drain(0)
            answers = await asyncio.wait_for(asyncio.gather(*readers), 10)
            assert {c.finish_reason for _, many in answers for c in many} <= {"abort", "length"}
            await settle(llm)

    asyncio.run(run())


def test_a_dead_engine_says_so_to_everyone(folder, monkeypatch):
    """E17: its thread ends with an error that is nobody's request's."""

    async def run():
        async with serve(folder) as (llm, engine):
            assert engine.is_healthy()
            reader = asyncio.create_task(read(engine.submit(llm.build_request("Hello", GREEDY))))

            def die(self):
                raise AssertionError("of the scheduler")

            monkeypatch.setattr(Engine, "step", die)
            with pytest.raises(UnavailableError, match="has died"):
                await asyncio.wait_for(reader, 5)
            engine._thread.join(5)
            assert not engine.is_healthy()
            with pytest.raises(UnavailableError):
                engine.submit(llm.build_request("Hello", GREEDY))

    asyncio.run(run())


def test_a_hanging_engine_is_not_healthy(folder, monkeypatch):
    """E17."""

    async def run():
        async with serve(folder, hang_seconds=0.1) as (llm, engine):
            goes_on = threading.Event()
            step = Engine.step

            def hang(self):
                goes_on.wait(5)
                return step(self)

            monkeypatch.setattr(Engine, "step", hang)
            stream = engine.submit(llm.build_request("Hello", GREEDY))
            await asyncio.sleep(0.3)
            assert not engine.is_healthy()
            goes_on.set()
            await read(stream)
            assert engine.is_healthy()

    asyncio.run(run())


def test_a_failing_pass_leaves_the_engine_alive(folder, monkeypatch):
    """E13 across the thread."""

    async def run():
        async with serve(folder) as (llm, engine):
            runner = llm.engine._runner
            monkeypatch.setattr(runner, "run", lambda given: 1 / 0)
            _, [completion] = await read(engine.submit(llm.build_request("Hello", GREEDY)))
            assert completion.finish_reason == "error"
            assert isinstance(completion.error, EngineError)
            monkeypatch.undo()
            assert engine.is_healthy()
            _, [completion] = await read(engine.submit(llm.build_request("Hello", GREEDY)))
            assert completion.finish_reason == "length"
            await settle(llm)

    asyncio.run(run())


def test_an_idle_engine_costs_nothing(folder):
    """E40, in short."""

    async def run():
        async with serve(folder) as (llm, engine):
            await read(engine.submit(llm.build_request("Hello", GREEDY)))
            before = time.process_time()
            await asyncio.sleep(1.5)
            assert time.process_time() - before < 0.03 + 0.02 * 1.5

    asyncio.run(run())


def test_a_burst_with_cancels(folder):
    asyncio.run(run_burst(folder, count=120, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_burst_of_500_with_cancels(folder, seed):
    """E10 at the engine."""
    asyncio.run(run_burst(folder, count=500, seed=seed))


async def run_burst(folder, *, count: int, seed: int) -> None:
    rng = random.Random(seed)
    async with serve(folder, max_num_seqs=64) as (llm, engine):

        async def one(number: int) -> str:
            params = SamplingParams(max_tokens=rng.randint(1, 64), seed=number)
            stream = engine.submit(llm.build_request(f"request {number}", params))
            leave_after = rng.randint(0, 60) if rng.random() < 0.3 else None
            num_pieces = 0
            async for updates in stream:
                for update in updates:
                    num_pieces += len(update.pieces)
                    if update.completion is not None:
                        return update.completion.finish_reason
                if leave_after is not None and num_pieces >= leave_after:
                    stream.cancel()
                    return "left"
            return "nothing"

        answers = await asyncio.wait_for(asyncio.gather(*map(one, range(count))), 60)
        assert set(answers) <= {"left", "stop", "length"}
        await settle(llm)


@pytest.mark.slow
def test_soak_of_10000_requests(folder):
    """E11 at the engine: mixed lengths, 10 % leave, 5 % are invalid, half share a beginning."""

    async def run():
        rng = random.Random(0)
        counts = {"finished": 0, "left": 0, "refused": 0}
        sizes = []
        async with serve(folder, max_num_seqs=32) as (llm, engine):
            gate = asyncio.Semaphore(64)

            async def one(number: int) -> None:
                async with gate:
                    length = rng.randint(1, 180)
                    shared = [7] * (length // 2) if rng.random() < 0.5 else []
                    ids = shared + [rng.randint(3, 250) for _ in range(length - len(shared))]
                    if rng.random() < 0.05:
                        ids = [10**6]
                    params = SamplingParams(max_tokens=rng.randint(1, 64), seed=number)
                    try:
                        stream = engine.submit(Request(prompt_ids=ids, params=params))
                    except RequestError:
                        counts["refused"] += 1
                        return
                    if rng.random() < 0.1:
                        stream.cancel()
                        counts["left"] += 1
                        return
                    _, [completion] = await read(stream)
                    assert completion.error is None
                    counts["finished"] += 1
                    if number % 1000 == 0:
                        sizes.append(read_resident_bytes())

            await asyncio.gather(*map(one, range(10_000)))
            await settle(llm)
            assert sum(counts.values()) == 10_000
            assert min(counts.values()) > 0
            assert threading.active_count() < 12
            assert sizes[-1] - sizes[len(sizes) // 4] < 10 * 2**20

    asyncio.run(run())


def read_resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
