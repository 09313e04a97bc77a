"""Several steps in one call leave all as one step at a time does, whenever an answer ends."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.engine.sequences import EOS, count_pool_bytes, make_engine, make_sequence
from tests.engine.serving import read, serve, settle
from tests.model_folder import save_tiny_model
from tests.tiny import make_config, make_model, make_tokens
from tramontane import LLM
from tramontane.engine import steps as steps_module
from tramontane.engine.block_manager import BlockManager
from tramontane.engine.completion import Completion, TextPiece
from tramontane.engine.model_runner import ModelRunner
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.scheduler import Share
from tramontane.engine.sequence import Sequence
from tramontane.engine.steps import plan_steps
from tramontane.errors import ConfigError, RequestError
from tramontane.kernels.native_decoder import ONE_STEP

PROMPTS = [make_tokens(length, seed=length).tolist() for length in (5, 20, 33, 16)]


@pytest.fixture(autouse=True)
def _native(choose_kernels: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, the steps are as many as may be."""
    choose_kernels("native")
    monkeypatch.setattr(steps_module, "MAX_SECONDS", 1e9)


@pytest.fixture(scope="module", params=[None, 20])
def model(request):
    return make_model(make_config(sliding_window=request.param))


def greedy(**changes) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 30, **changes})


class Run:
    """Answers in an engine of their own, and all that can be seen of them on the way."""

    def __init__(self, model, asked: list[SamplingParams], most: int, **limits: int) -> None:
        self.engine = make_engine(model, max_num_steps=most, **limits)
        self.sequences = [
            make_sequence(PROMPTS[i % len(PROMPTS)], params, eos_ids=frozenset({77, 999}))
            for i, params in enumerate(asked)
        ]
        self.pieces: dict[Sequence, list[TextPiece]] = {s: [] for s in self.sequences}
        self.num_calls = 0
        for sequence in self.sequences:
            self.engine.add(sequence)

    def step(self) -> list[Sequence]:
        touched = self.engine.step()
        self.num_calls += 1
        self.engine.check_integrity()
        assert len(set(touched)) == len(touched)
        for sequence in touched:
            if sequence in self.pieces:
                self.pieces[sequence] += sequence.take_pieces()
        return touched

    def finish(self) -> list[Completion]:
        while self.engine.num_unfinished:
            self.step()
        assert self.engine.num_cache_bytes == 0
        return [sequence.build_completion() for sequence in self.sequences]


def describe(completion: Completion) -> tuple:
    return (completion.token_ids, completion.text, completion.finish_reason,
            completion.stop_reason, completion.num_cached_tokens)  # fmt: skip


def assert_equal(model, asked: list[SamplingParams], **limits: int) -> tuple[Run, Run]:
    """Answers, pieces, counts of all kinds, and what is kept for later prompts."""
    one, several = (Run(model, asked, most, **limits) for most in (1, 8))
    expected, found = one.finish(), several.finish()
    assert [describe(c) for c in found] == [describe(c) for c in expected]
    assert list(several.pieces.values()) == list(one.pieces.values())
    assert several.engine.get_stats() == one.engine.get_stats()
    for completion, sequence in zip(expected, one.sequences, strict=True):
        prompt = [*sequence.request.prompt_ids, *completion.token_ids, 5]
        kept = []
        for run in (one, several):
            again = make_sequence(prompt, greedy(max_tokens=1))
            run.engine.add(again)
            run.finish()
            kept.append(again.build_completion().num_cached_tokens)
        assert kept[0] == kept[1]
    return one, several


@pytest.mark.parametrize("count", [1, 3, 7])
def test_until_the_last_token(model, count):
    one, several = assert_equal(model, [greedy(max_tokens=30 - i) for i in range(count)])
    assert several.num_calls < one.num_calls
    if count == 1:  # a prompt of 5, then 11 to the end of its block, 16, and the rest
        assert several.num_calls - 1 < (one.num_calls - 1) / 3


@pytest.mark.parametrize("at", range(12))
def test_an_end_in_the_middle(model, at):
    """By id and by text, alone and beside others, which go on."""
    [free] = Run(model, [greedy(ignore_eos=True)], 1).finish()
    by_id = greedy(stop_token_ids=(free.token_ids[at],))
    by_text = greedy(stop=(free.text[at : at + 2],), ignore_eos=True)
    for params in (by_id, by_text):
        assert_equal(model, [params])
        one, several = assert_equal(model, [params, greedy(), greedy(max_tokens=21), params])
        assert several.num_calls < one.num_calls
        assert several.sequences[0].finish_reason == "stop"


DRAWN = [
    {"temperature": 0.8}, {"temperature": 1.5, "top_k": 7}, {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.1}, {"temperature": 1e-9}, {"temperature": 0},
]  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 6])
def test_drawn_tokens(model, count):
    """Each by its own numbers, beside others that are drawn otherwise or take the best."""
    for ends in ({}, {"ignore_eos": True}, {"stop": (" ",)}, {"min_tokens": 5}):
        asked = [greedy(**DRAWN[i], **ends, seed=i) for i in range(count)]
        one, several = assert_equal(model, asked)
        assert several.num_calls < one.num_calls


def test_numbers_that_were_looked_at_are_drawn_later(model):
    """Steps end in between, and go on one by one: the same random numbers come in their order."""
    params = greedy(temperature=1.2, seed=3, ignore_eos=True)
    [expected] = Run(model, [params], 1).finish()
    run = Run(model, [params], 8)
    run.step()
    run.step()
    run.engine.limits = replace(run.engine.limits, max_num_steps=1)
    for _ in range(3):
        run.step()
    run.engine.limits = replace(run.engine.limits, max_num_steps=5)
    [found] = run.finish()
    assert found.token_ids == expected.token_ids


def test_a_model_that_ends_by_itself(model):
    [free] = Run(model, [greedy(ignore_eos=True)], 1).finish()
    runs = [
        make_sequence(PROMPTS[0], greedy(), eos_ids=frozenset({free.token_ids[9]})) for _ in "ab"
    ]
    for sequence, most in zip(runs, (1, 8), strict=True):
        engine = make_engine(model, max_num_steps=most)
        engine.add(sequence)
        while engine.num_unfinished:
            engine.step()
    assert describe(runs[0].build_completion()) == describe(runs[1].build_completion())
    assert runs[1].finish_reason == "stop"


def test_experts_are_counted_to_the_end_of_each_answer(model):
    """Of a batch in which a text ends one answer and the others go on."""
    [free] = Run(model, [greedy(ignore_eos=True)], 1).finish()
    asked = [greedy(stop=(free.text[6:8],), ignore_eos=True), greedy(experts_per_token=3)]
    run = Run(model, asked, 8)
    run.finish()
    ran = [len(sequence.token_ids) - 1 for sequence in run.sequences]  # the last never does
    assert ran[0] < ran[1]
    for layer in run.engine.get_stats().expert_tokens:
        assert sum(layer) == 2 * ran[0] + 3 * ran[1]


@pytest.mark.parametrize("changes", [
    {"logprobs": 1}, {"repetition_penalty": 1.3},
    {"logit_bias": {5: 3.0}}, {"allowed_token_ids": tuple(range(60))}, {"min_tokens": 30},
], ids=str)  # fmt: skip
def test_whatever_more_is_asked_for_comes_step_by_step(model, changes):
    changed = greedy(ignore_eos=True, **changes)
    for asked in ([changed], [greedy(ignore_eos=True), changed]):
        one, several = assert_equal(model, asked)
        assert several.num_calls == one.num_calls


@pytest.mark.parametrize("wanted", [{"routing": "answer"}, {"wants_embedding": True}], ids=str)
def test_what_needs_each_step_runs_step_by_step(model, wanted):
    engine = make_engine(model)
    sequence = make_sequence(PROMPTS[0], greedy(), eos_ids=frozenset(), **wanted)
    engine.add(sequence)
    num_calls = 0
    while engine.num_unfinished:
        engine.step()
        num_calls += 1
    assert num_calls == 30


def test_min_tokens_holds_them_back_until_they_are_there(model):
    one, several = assert_equal(model, [greedy(min_tokens=10)])
    assert 10 < several.num_calls < one.num_calls


def test_a_full_cache_preempts_as_ever(model):
    limits = {"kv_cache_memory_bytes": count_pool_bytes(model, 9)}
    asked = [greedy(max_tokens=60, ignore_eos=True) for _ in range(4)]
    _, several = assert_equal(model, asked, **limits)
    if model.config.sliding_window is None:
        assert several.engine.get_stats().num_preemptions > 0


def test_nobody_waits_behind_several_steps(model):
    """While one waits for its turn, answers come step by step."""
    asked = [greedy(ignore_eos=True)] * 2
    one, several = assert_equal(model, asked, max_num_seqs=1)
    assert several.num_calls < one.num_calls  # the second is alone at the end
    run = Run(model, asked, 8, max_num_seqs=1)
    for num_tokens in range(1, 10):
        run.step()
        assert len(run.sequences[0].token_ids) == len(PROMPTS[0]) + num_tokens


@pytest.mark.parametrize("num_calls", [1, 2, 3])
def test_who_comes_and_who_leaves_in_between(model, num_calls):
    alone = [Run(model, [greedy()] * (i + 1), 1).finish()[i] for i in range(4)]
    run = Run(model, [greedy()] * 3, 8)
    for _ in range(num_calls):
        run.step()
    late = make_sequence(PROMPTS[3], greedy(), eos_ids=frozenset({77, 999}))
    run.engine.add(late)
    run.engine.abort(run.sequences[1])
    assert not run.sequences[1].block_table
    found = run.finish()
    for i in (0, 2):
        assert describe(found[i])[:4] == describe(alone[i])[:4]
    assert found[1].finish_reason == "abort"
    assert found[1].token_ids == alone[1].token_ids[: len(found[1].token_ids)]
    assert late.build_completion().token_ids == alone[3].token_ids


@pytest.mark.parametrize("seed", range(8))
def test_random_schedules_equal_one_at_a_time(model, seed):
    """Requests that end, come and leave at any moment, in engines of all sizes."""
    rng = random.Random(seed)
    [free] = Run(model, [greedy(ignore_eos=True)], 1).finish()
    kinds = [{}, {"stop": (free.text[4:6],)}, {"stop_token_ids": free.token_ids[7:9]},
             {"experts_per_token": 3}, {"ignore_eos": True},
             {"temperature": 1.1, "seed": seed}]  # fmt: skip
    asked = [greedy(max_tokens=rng.randint(1, 40), **rng.choice(kinds)) for _ in range(16)]
    alone = [Run(model, [params], 1).finish()[0] for params in asked]
    engine = make_engine(
        model,
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.randint(6, 40),
        kv_cache_memory_bytes=count_pool_bytes(model, rng.randint(6, 30)),
        max_num_steps=rng.randint(2, 16),
    )
    sequences: list[Sequence] = []
    while len(sequences) < len(asked) or engine.num_unfinished:
        if len(sequences) < len(asked) and rng.random() < 0.3:
            params = asked[len(sequences)]
            sequences.append(make_sequence(PROMPTS[0], params, eos_ids=frozenset({77, 999})))
            engine.add(sequences[-1])
        if sequences and rng.random() < 0.05:
            engine.abort(rng.choice(sequences))
        engine.step()
        engine.check_integrity()
    assert engine.num_cache_bytes == 0
    for sequence, expected in zip(sequences, alone, strict=True):
        found = sequence.build_completion()
        if found.finish_reason == "abort":
            assert found.token_ids == expected.token_ids[: len(found.token_ids)]
        else:
            assert describe(found)[:4] == describe(expected)[:4]


@pytest.mark.parametrize("at", range(1, 10))
def test_an_answer_that_cannot_be_decoded_ends_alone(model, at):
    expected = Run(model, [greedy()] * 3, 1).finish()
    runs = [Run(model, [greedy()] * 3, most) for most in (1, 8)]
    for run in runs:
        output = run.sequences[1].answer._text_output
        push, num_calls = output._decoder.push, 0

        def fail(token_id, *, push=push):
            nonlocal num_calls
            num_calls += 1
            if num_calls == at:
                raise RequestError("no text")
            return push(token_id)

        output._decoder.push = fail
        num_calls = 0
        found = run.finish()
        assert str(run.sequences[1].error) == "no text"
        assert [describe(found[i]) for i in (0, 2)] == [describe(expected[i]) for i in (0, 2)]
    assert runs[0].engine.get_stats() == runs[1].engine.get_stats()


def test_scores_that_are_not_finite_end_the_answer_where_they_are():
    model = make_model()
    [free] = Run(model, [greedy(ignore_eos=True)], 1).finish()
    at = next(i for i in range(4, 12) if free.token_ids[i] not in
              [*free.token_ids[:i], *PROMPTS[0]])  # fmt: skip
    with torch.no_grad():
        model.tok_embeddings.weight[free.token_ids[at]] = float("nan")
    for most in (1, 8):
        run = Run(model, [greedy(ignore_eos=True)], most)
        [found] = run.finish()
        assert found.finish_reason == "error"
        assert found.token_ids == free.token_ids[: at + 1]
        assert run.engine.get_stats().num_passes == at + 2


def test_a_call_that_fails_ends_the_requests_in_it(model, monkeypatch):
    run = Run(model, [greedy()] * 2, 8)
    run.step()
    run.step()

    def fail(*_):
        raise RuntimeError("odd")

    monkeypatch.setattr(ModelRunner, "run", fail)
    run.step()
    assert {sequence.finish_reason for sequence in run.sequences} == {"error"}
    assert run.engine.num_cache_bytes == 0


def test_other_kernels_and_drafts_run_step_by_step(model, choose_kernels):
    for limits, kernels in (({"max_num_drafts": 2}, "native"), ({}, "fused")):
        choose_kernels(kernels)
        [expected] = Run(model, [greedy()], 1, **limits).finish()
        [found] = Run(model, [greedy()], 8, **limits).finish()
        assert found.token_ids == expected.token_ids


def test_a_slow_model_runs_one_step_in_a_call(model, monkeypatch):
    monkeypatch.setattr(steps_module, "MAX_SECONDS", 0.0)
    one, several = assert_equal(model, [greedy()])
    assert several.num_calls == one.num_calls


def test_the_plan_takes_blocks_ahead_or_ends_with_the_first_full_block():
    """18, 21 and 43 tokens have run, in 7 blocks: five more fill one. 8 steps need one more."""
    shares = []
    roomy, full = BlockManager(7 + 1 + 3), BlockManager(7 + 1 + 2)
    for count in (18, 21, 43):
        sequence = make_sequence(range(3, 3 + count), greedy(stop_token_ids=(9,)))
        sequence.append_token(1)
        sequence.num_computed_tokens = count
        shares.append(Share(sequence, 1))
    assert_plan(shares, roomy, most=8, expected=8)
    assert_plan(shares, full, most=8, expected=5)
    assert_plan(shares, full, most=3, expected=3)
    first, second, _ = (share.sequence for share in shares)
    for _ in range(26):
        first.append_token(1)
    first.num_computed_tokens += 26  # three are left of its thirty
    assert_plan(shares, roomy, most=8, expected=3)
    second.append_token(1)  # two have to run
    assert plan_steps(shares, roomy, most=8) is ONE_STEP


def assert_plan(shares: list[Share], blocks: BlockManager, *, most: int, expected: int) -> None:
    """So many steps, the places for which are there; all blocks are given back."""
    sequences = [share.sequence for share in shares]
    for sequence in sequences:
        num_tokens, sequence.num_computed_tokens = sequence.num_computed_tokens, 0
        assert blocks.reserve(sequence, num_tokens + 1)
        sequence.num_computed_tokens = num_tokens
    plan = plan_steps(shares, blocks, most=most)
    assert (plan.most, plan.ends.tolist()) == (expected, [EOS, 9])
    blocks.check_integrity(sequences)
    for sequence in sequences:
        places = len(sequence.block_table) * blocks.block_size
        assert places >= sequence.num_computed_tokens + expected
        num_tokens = sequence.num_computed_tokens
        blocks.free(sequence)
        sequence.num_computed_tokens = num_tokens


def test_no_steps_at_all_are_refused(model):
    with pytest.raises(ConfigError, match="max_num_steps is 0"):
        make_engine(model, max_num_steps=0)


def test_streams_beside_each_other(tmp_path):
    """In a server: one comes later, one leaves, and the pieces of each make up its text."""

    async def run():
        folder = save_tiny_model(tmp_path / "tiny")
        params = greedy(max_tokens=60, ignore_eos=True)
        texts = ["Hello", "Once upon a time", "x"]
        alone = [LLM(folder, max_num_steps=1).generate(text, params) for text in texts]
        async with serve(folder) as (llm, engine):
            first, second, third = (llm.build_request(text, params) for text in texts)
            stream, leaving = engine.submit(first), engine.submit(second)
            pieces = [piece for update in await anext(stream) for piece in update.pieces]
            await anext(leaving)
            leaving.cancel()
            late = asyncio.create_task(read(engine.submit(third)))
            async for updates in stream:
                pieces += [piece for update in updates for piece in update.pieces]
            assert tuple(piece.token_id for piece in pieces) == alone[0].token_ids
            assert "".join(piece.text for piece in pieces) == alone[0].text
            [text], [completion] = await late
            assert completion.token_ids == alone[2].token_ids
            assert text == alone[2].text
            await settle(engine)

    asyncio.run(run())
