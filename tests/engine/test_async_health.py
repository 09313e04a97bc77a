"""E17: an engine that has died or hangs is told from one that takes its time."""

import asyncio
import threading
import time

import pytest

from tests.engine.serving import GREEDY, read, serve
from tests.model_folder import save_tiny_model
from tramontane.engine.engine import Engine
from tramontane.engine.pulse import Patience, Pulse
from tramontane.errors import ConfigError, UnavailableError

IMPATIENT = Patience(hang_seconds=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


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


def test_an_engine_that_stands_still_is_not_healthy(folder, monkeypatch):
    """It is healthy again once it goes on."""

    async def run():
        async with serve(folder, patience=IMPATIENT) as (llm, engine):
            goes_on = threading.Event()
            step = Engine.step

            def hang(self):
                goes_on.wait(60)
                return step(self)

            monkeypatch.setattr(Engine, "step", hang)
            stream = engine.submit(llm.build_request("Hello", GREEDY))
            await wait_until(lambda: not engine.is_healthy())
            with pytest.raises(UnavailableError):
                engine.submit(llm.build_request("Hello", GREEDY))
            goes_on.set()
            _, [completion] = await read(stream)
            assert completion.finish_reason == "length"
            assert engine.is_healthy()

    asyncio.run(run())


def test_an_engine_that_computes_for_long_is_healthy(folder, monkeypatch):
    """A pass of three times `hang_seconds`, looked at all the while; then beyond its bound."""

    async def run(patience: Patience) -> set[bool]:
        async with serve(folder, patience=patience) as (llm, engine):
            reader = asyncio.create_task(read(engine.submit(llm.build_request("Hello", GREEDY))))
            looks = set()
            while not reader.done():
                looks.add(engine.is_healthy())
                await asyncio.sleep(0.05)
            return looks

    step, long_ones = Engine.step, [None]

    def compute(self):
        if self.num_unfinished and long_ones:
            long_ones.pop()
            until = time.thread_time() + 3 * IMPATIENT.hang_seconds
            while time.thread_time() < until:
                sum(range(10_000))
        return step(self)

    monkeypatch.setattr(Engine, "step", compute)
    assert asyncio.run(run(IMPATIENT)) == {True}
    long_ones.append(None)
    short = Patience(hang_seconds=0.5, max_pass_seconds=0.6)
    assert asyncio.run(run(short)) == {True, False}


def test_an_idle_engine_is_healthy_however_short_its_patience(folder):
    async def run():
        async with serve(folder, patience=Patience(hang_seconds=1e-6)) as (_, engine):
            assert engine.is_healthy()
            await asyncio.sleep(0.1)
            assert engine.is_healthy()

    asyncio.run(run())


class Times:
    """Clocks that a test sets."""

    def __init__(self) -> None:
        self.now = self.used = 0.0
        self.pulse = Pulse(
            Patience(hang_seconds=3.0, max_pass_seconds=60.0), lambda: self.used,
            clock=lambda: self.now,
        )  # fmt: skip

    def is_hanging(self, *, after: float, used: float) -> bool:
        self.now += after
        self.used += used
        return self.pulse.is_hanging()


def test_standing_still_is_measured_from_the_last_movement():
    times = Times()
    times.pulse.beat()
    assert not times.is_hanging(after=2.9, used=0)
    assert times.is_hanging(after=0.2, used=0.01)
    assert not times.is_hanging(after=0.5, used=0.03)
    assert not times.is_hanging(after=3.0, used=0)
    assert times.is_hanging(after=0.1, used=0)
    times.pulse.beat()
    assert not times.is_hanging(after=0.1, used=0)


def test_a_busy_thread_with_a_small_share_of_the_processor_moves():
    times = Times()
    times.pulse.beat()
    assert not any(times.is_hanging(after=0.5, used=0.02) for _ in range(119))
    assert not times.is_hanging(after=0.5, used=0.02)
    assert times.is_hanging(after=0.5, used=0.5)  # beyond max_pass_seconds


def test_rest_is_no_hanging():
    times = Times()
    assert not times.is_hanging(after=1000, used=0)
    times.pulse.beat()
    times.pulse.rest()
    assert not times.is_hanging(after=1000, used=0)


@pytest.mark.parametrize("field", ["hang_seconds", "max_pass_seconds"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_patience_out_of_range_is_named(field, value):
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        Patience(**{field: value})


async def wait_until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.02)
    pytest.fail("it never happened")
