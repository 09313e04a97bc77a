"""The engine behind a server: streams, leaving, limits (rows A04, A14, A16, E13 - E15)."""

import asyncio
import json

import pytest

from tests.engine.sequences import count_pool_bytes
from tests.engine.serving import GREEDY, read, serve, settle
from tests.model_folder import save_tiny_model
from tramontane import LLM, SamplingParams
from tramontane.engine.async_engine import AnswerStream, AsyncEngine
from tramontane.engine.constraint import Constraint
from tramontane.engine.request import Request
from tramontane.errors import (
    CapacityError,
    ContextError,
    EngineError,
    OverloadError,
    RequestError,
    UnavailableError,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_200_requests_at_once_are_answered_as_each_alone(folder):
    """A04, A16: and the pieces of each make up its text."""

    async def run():
        async with serve(folder, max_num_seqs=32) as (llm, engine):
            requests = [llm.build_request(f"marker {i} " * (i % 5 + 1), GREEDY) for i in range(200)]
            alone = LLM(folder).run(requests[::20])
            answers = await asyncio.gather(*(read(engine.submit(r)) for r in requests))
            await settle(engine)
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
        limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_num_steps": 1}
        async with serve(folder, **limits) as (llm, engine):
            params = SamplingParams(n=2, seed=1, max_tokens=100, ignore_eos=True)
            streams = [engine.submit(llm.build_request("word " * 20, params)) for _ in range(6)]
            for stream in streams:
                for _ in range(moment):
                    await anext(stream)
                stream.cancel()
                stream.cancel()
            await settle(engine)
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
            await settle(engine)

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
            await settle(engine)

    asyncio.run(run())


def test_a_failing_pass_leaves_the_engine_alive(folder, monkeypatch):
    """E13 across the thread."""

    async def run():
        async with serve(folder) as (llm, engine):
            monkeypatch.setattr(engine._engine._runner, "run", lambda given: 1 / 0)
            _, [completion] = await read(engine.submit(llm.build_request("Hello", GREEDY)))
            assert completion.finish_reason == "error"
            assert isinstance(completion.error, EngineError)
            monkeypatch.undo()
            assert engine.is_healthy()
            _, [completion] = await read(engine.submit(llm.build_request("Hello", GREEDY)))
            assert completion.finish_reason == "length"
            await settle(engine)

    asyncio.run(run())


def test_one_engine_is_run_by_one_thread(folder):
    """Whoever holds the model too is refused; what was begun there must end first."""

    async def run():
        llm = LLM(folder)
        stream = llm.stream("Hello", GREEDY)
        with pytest.raises(EngineError, match=r"1 answers of .* are unfinished"):
            AsyncEngine(llm)
        stream.close()
        engine = AsyncEngine(llm)
        for ask in (llm.generate, llm.stream):
            with pytest.raises(EngineError, match="handed to an AsyncEngine"):
                ask("Hello", GREEDY)
        with pytest.raises(EngineError, match="handed to an AsyncEngine"):
            AsyncEngine(llm)
        engine.start()
        _, [completion] = await read(engine.submit(llm.build_request("Hello", GREEDY)))
        assert completion.token_ids == LLM(folder).generate("Hello", GREEDY).token_ids
        engine.stop()

    asyncio.run(run())


def test_passes_are_counted_by_their_size(folder):
    async def run():
        async with serve(folder, max_num_batched_tokens=16, max_num_seqs=4) as (llm, engine):
            _, [completion] = await read(engine.submit(llm.build_request("x" * 39, GREEDY)))
            stats = engine.get_stats()
            assert completion.num_prompt_tokens == 40
            assert stats.pass_sizes == {16: 2, 8: 1, 1: 15}
            assert stats.num_passes == 18
            assert engine.cache_config["block_size"] == 16
            assert engine.cache_config["num_gpu_blocks"] == 4 * 256 / 16
            assert engine.cache_config["cache_dtype"] == "float32"

    asyncio.run(run())
