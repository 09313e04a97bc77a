"""Many requests at once, many in a row, and none at all (rows E10, E11, E40)."""

import asyncio
import random
import threading
import time

import pytest

from tests.engine.serving import GREEDY, read, serve, settle
from tests.model_folder import save_tiny_model
from tramontane import SamplingParams
from tramontane.engine.async_engine import MAX_QUEUED
from tramontane.engine.constraint import Constraint
from tramontane.engine.constraints import COMPILE_SECONDS, MAX_CACHED, MAX_GRAMMARS
from tramontane.engine.request import Request
from tramontane.errors import OverloadError, RequestError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_an_idle_engine_costs_nothing(folder):
    """E40, in short."""

    async def run():
        async with serve(folder) as (llm, engine):
            await read(engine.submit(llm.build_request("Hello", GREEDY)))
            before = time.process_time()
            await asyncio.sleep(1.5)
            assert time.process_time() - before < 0.03 + 0.02 * 1.5

    asyncio.run(run())


def test_answers_that_have_ended_hold_no_constraint(folder):
    """A13: whoever keeps them, and whenever the garbage is collected, others get theirs."""
    pytest.importorskip("llguidance")

    async def run():
        kept = []
        async with serve(folder) as (llm, engine):
            for number in range(MAX_GRAMMARS + MAX_CACHED + 5):
                constraint = Constraint("regex", f"[a-z]{{3}}{number}")
                params = SamplingParams(max_tokens=2, constraint=constraint)
                kept.append(engine.submit(llm.build_request("Hello", params)))
                if number % 2:
                    kept[-1].cancel()
                _, completions = await read(kept[-1])
                assert [c.error for c in completions] == ([] if number % 2 else [None])

    asyncio.run(run())


def test_slow_constraints_hold_up_nobody_else(folder):
    """A13: so many wait to be compiled, those whose caller left are not, and no place is taken."""
    pytest.importorskip("llguidance")

    def build(llm, number: int) -> Request:
        source = f"({'(a|b|c)*' * 40}){{40}}{number}"
        params = SamplingParams(max_tokens=2, constraint=Constraint("regex", source))
        return llm.build_request("Hello", params)

    async def run():
        async with serve(folder, max_waiting=MAX_QUEUED + 1) as (llm, engine):
            started = time.monotonic()
            streams = [engine.submit(build(llm, number)) for number in range(MAX_QUEUED)]
            with pytest.raises(OverloadError, match="wait to be compiled"):
                engine.submit(build(llm, MAX_QUEUED))
            _, [completion] = await read(engine.submit(llm.build_request("Hello", GREEDY)))
            assert completion.error is None
            for stream in streams:
                stream.cancel()
            simple = SamplingParams(max_tokens=2, constraint=Constraint("regex", "[ab]"))
            _, [completion] = await read(engine.submit(llm.build_request("Hello", simple)))
            assert completion.error is None
            assert time.monotonic() - started < MAX_QUEUED * COMPILE_SECONDS / 2
            await settle(engine)

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
        await settle(engine)


@pytest.mark.slow
def test_soak_of_10000_requests(folder):
    """E11 at the engine: mixed lengths, 10 % leave, 5 % are invalid, half share a beginning."""

    async def run():
        rng = random.Random(0)
        counts = {"finished": 0, "left": 0, "refused": 0}
        sizes = []
        async with serve(folder, max_num_seqs=32) as (_, engine):
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
            await settle(engine)
            assert sum(counts.values()) == 10_000
            assert min(counts.values()) > 0
            assert threading.active_count() < 12
            assert sizes[-1] - sizes[len(sizes) // 4] < 10 * 2**20

    asyncio.run(run())


def read_resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
