"""Bursts and soaks over real sockets (reliability rows E10 and E11, as the HTTP server sees them).

Clients speak HTTP themselves, so that hundreds fit into this process beside the server. With a tiny
model, and with an engine that takes its time. `pytest -m slow -s` prints the figures.
"""

import asyncio
import gc
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from tests.model_folder import save_tiny_model
from tests.server.fake_engine import FakeEngine
from tests.server.live import LiveServer, run_live, run_real
from tramontane.engine.async_engine import AsyncEngine

pytestmark = pytest.mark.slow
POOL_THREADS = 40  # that anyio keeps for what would block: fewer than the requests by far
OpenServer = Callable[[], AbstractContextManager[LiveServer]]


@pytest.fixture(params=["tiny model", "slow engine"])
def open_server(request: pytest.FixtureRequest, tmp_path) -> OpenServer:
    if request.param == "slow engine":

        def make_engine() -> FakeEngine:
            engine = FakeEngine(seconds_per_token=0.02, max_running=128)
            engine.keeps_requests = False
            return engine

        return lambda: run_live(make_engine)
    folder = save_tiny_model(tmp_path / "tiny", max_seq_len=512)
    return lambda: run_real(folder, limits={"max_num_seqs": 128})


async def ask(live: LiveServer, body: dict, *, leave_after: int | None = None) -> str:
    """How a streamed request ended: "whole", "left", "broken", or its status if it is not 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
    data = json.dumps({"stream": True, "ignore_eos": True, **body}).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data
    )
    try:
        async with asyncio.timeout(60):
            status = (await reader.readline()).split()[1].decode()
            return status if status != "200" else await _read(reader, leave_after)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, leave_after: int | None) -> str:
    num_events, is_finished = 0, False
    while line := await reader.readline():
        num_events += line.startswith(b"data: ")
        is_finished = is_finished or b'"finish_reason":"length"' in line
        if line.startswith(b"data: [DONE]"):
            return "whole" if is_finished else "broken"
        if leave_after is not None and num_events > leave_after:
            return "left"
    return "broken"


def count_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_for_files(most: int) -> None:
    """The server closes the sockets of those who left a moment later."""
    until = time.monotonic() + 5
    while (count := count_files()) > most:
        assert time.monotonic() < until, (count, most)
        time.sleep(0.05)


def read_memory() -> int:
    """Resident bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_nothing_is_held(live: LiveServer) -> None:
    live.wait_idle(10)
    if isinstance(live.engine, AsyncEngine):
        assert live.engine.get_stats().kv_cache_usage == 0
        live.engine._engine.check_integrity()


def test_a_burst_of_500_streams(open_server: OpenServer):
    """E10: 30% leave at a random token; the rest ends whole; five times."""

    async def burst(live: LiveServer, generator: random.Random) -> Counter[str]:
        async def one(number: int) -> str:
            await asyncio.sleep(generator.random())  # all within a second
            body = {"prompt": f"Story {number}", "max_tokens": generator.randint(2, 64)}
            leave_after = generator.randrange(64) if generator.random() < 0.3 else None
            return await ask(live, body, leave_after=leave_after)

        return Counter(await asyncio.gather(*(one(number) for number in range(500))))

    with open_server() as live:
        generator, files = random.Random(0), count_files()
        for _ in range(5):
            start = time.monotonic()
            ends = asyncio.run(burst(live, generator))
            print(f"\n500 streams: {dict(ends)} in {time.monotonic() - start:.1f} s", end="")
            assert set(ends) <= {"whole", "left"}, ends
            assert ends["whole"] >= 300
            check_nothing_is_held(live)
        wait_for_files(files + 2)
        assert live.client.get("/health").status_code == 200


def test_a_soak_of_10000_requests(open_server: OpenServer):
    """E11: 64 in flight, 10% leave, 5% are invalid; nothing is left, and memory does not grow."""

    async def soak(live: LiveServer, total: int) -> Counter[str]:
        generator, ends, waiting = random.Random(1), Counter(), list(range(total))

        async def work() -> None:
            while waiting:
                number, kind = waiting.pop(), generator.random()
                prompt = ("The same beginning. " if number % 2 else f"{number} ") * 4
                body = {"prompt": prompt[: generator.randint(1, 80)],
                        "max_tokens": generator.randint(1, 64)}  # fmt: skip
                if kind < 0.05:
                    body["temperature"] = 9
                leave_after = generator.randrange(8) if 0.05 <= kind < 0.15 else None
                ends[await ask(live, body, leave_after=leave_after)] += 1

        await asyncio.gather(*(work() for _ in range(64)))
        return ends

    with open_server() as live:
        asyncio.run(soak(live, 2_000))
        check_nothing_is_held(live)
        gc.collect()
        files, threads, memory = count_files(), threading.active_count(), read_memory()
        start = time.monotonic()
        ends = asyncio.run(soak(live, 8_000))
        seconds = time.monotonic() - start
        check_nothing_is_held(live)
        gc.collect()
        grown = read_memory() - memory
        print(f"\n8,000 requests: {dict(ends)} in {seconds:.0f} s, memory {grown / 2**20:+.1f} MiB")
        assert set(ends) <= {"whole", "left", "400"}, ends
        assert ends.total() == 8_000
        assert 300 < ends["400"] < 500
        wait_for_files(files + 2)
        assert threading.active_count() <= threads + POOL_THREADS
        assert grown < 8 * 2**20  # 1 MiB per thousand requests
