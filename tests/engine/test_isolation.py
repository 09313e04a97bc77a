"""One request that fails ends alone, and no block is lost (rows E13, E14, K10, A14 in part)."""

import pytest
import torch

from tests.engine.sequences import (
    GREEDY,
    count_pool_bytes,
    generate,
    make_engine,
    make_sequence,
    make_sequences,
    run_to_end,
)
from tests.tiny import make_model, make_tokens
from tramontane.engine import output_processor
from tramontane.engine.block_manager import BlockManager
from tramontane.engine.model_runner import ModelRunner
from tramontane.engine.sampling_params import SamplingParams
from tramontane.errors import CapacityError, CheckpointError, EngineError, RequestError

PROMPTS = [make_tokens(length, seed=length).tolist() for length in (5, 20, 33)]


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def alone(model):
    return [generate(model, prompt) for prompt in PROMPTS]


def break_at(monkeypatch, owner, name, call, error):
    """The call number `call` of a method raises `error`; returns whether it has."""
    original, num_calls = getattr(owner, name), 0

    def maybe(*arguments, **options):
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, maybe)
    return lambda: num_calls >= call


@pytest.mark.parametrize("error", [RuntimeError("odd"), MemoryError("odd"), CapacityError("odd")])
@pytest.mark.parametrize("call", [*range(1, 15), 20, 30, 50])
@pytest.mark.parametrize("most", [1, 8])
def test_a_pass_that_fails_ends_the_requests_in_it(model, alone, monkeypatch, call, error, most):
    """E13: the next request works."""
    engine = make_engine(model, max_num_steps=most)
    sequences = [make_sequence(prompt) for prompt in PROMPTS]
    late = make_sequence(PROMPTS[1])
    has_failed = break_at(monkeypatch, ModelRunner, "run", call, error)
    run_to_end(engine, *sequences)
    run_to_end(engine, late)
    for sequence in sequences:
        if sequence.error is None:
            continue
        assert sequence.finish_reason == "error"
        kind = CapacityError if isinstance(error, CapacityError) else EngineError
        assert isinstance(sequence.error, kind)
        assert ("odd" in str(sequence.error)) == (kind is CapacityError)  # ours are told
    if late.error is None:
        assert late.build_completion().token_ids == tuple(alone[1])
    num_failed = sum(s.error is not None for s in [*sequences, late])
    assert (num_failed > 0) == has_failed()
    assert most > 1 or has_failed() == (call <= 24)


@pytest.mark.parametrize("method", ["edit", "accept"])
def test_a_sampler_that_fails_ends_its_own_request(model, alone, method):
    engine = make_engine(model)
    sequences = [make_sequence(prompt) for prompt in PROMPTS]
    broken = make_sequence(PROMPTS[0], SamplingParams(max_tokens=9, presence_penalty=1))

    def fail(*_):
        raise ZeroDivisionError("of the sampler")

    setattr(broken.sampler, method, fail)
    run_to_end(engine, *sequences, broken)
    assert isinstance(broken.error, EngineError)
    assert "(ZeroDivisionError; see its log)" in str(broken.error)
    assert str(broken.error.__cause__) == "of the sampler"
    assert [list(s.build_completion().token_ids) for s in sequences] == alone


@pytest.mark.parametrize("name", ["choose_tokens", "_list_parts"])
def test_a_defect_after_the_pass_ends_the_requests_in_it(model, alone, monkeypatch, name):
    engine = make_engine(model)
    sequences = [make_sequence(prompt) for prompt in PROMPTS]
    break_at(monkeypatch, output_processor, name, 3, AttributeError("odd"))
    run_to_end(engine, *sequences)
    assert {type(sequence.error) for sequence in sequences} == {EngineError}
    late = make_sequence(PROMPTS[1])
    run_to_end(engine, late)
    assert list(late.build_completion().token_ids) == alone[1]


def test_a_failure_after_a_fork_ends_all_answers(model, alone, monkeypatch):
    """They hold the prompt's blocks and have no token yet: nobody could run them."""
    engine = make_engine(model)
    forked = make_sequences(PROMPTS[0], SamplingParams(n=3, max_tokens=5))
    break_at(monkeypatch, output_processor, "choose_tokens", 1, MemoryError("odd"))
    engine.add(forked[0])
    assert set(engine.step()) == set(forked)
    assert {type(sequence.error) for sequence in forked} == {EngineError}
    late = make_sequence(PROMPTS[1])
    run_to_end(engine, late)
    assert list(late.build_completion().token_ids) == alone[1]


def test_who_has_ended_in_a_pass_that_fails_is_told(model, monkeypatch):
    engine = make_engine(model)
    embedded = make_sequence(PROMPTS[0], SamplingParams(max_tokens=0), wants_embedding=True)
    sampled = make_sequence(PROMPTS[1])
    break_at(monkeypatch, output_processor, "choose_tokens", 1, MemoryError("odd"))
    engine.add(embedded)
    engine.add(sampled)
    assert set(engine.step()) == {embedded, sampled}
    assert embedded.build_completion().embedding is not None
    assert isinstance(sampled.error, EngineError)
    engine.check_integrity()
    assert engine.num_cache_bytes == 0


@pytest.mark.parametrize(
    ("params", "options"),
    [
        (SamplingParams(max_tokens=0, prompt_logprobs=1), {}),
        (SamplingParams(max_tokens=0), {"wants_embedding": True}),
        (SamplingParams(max_tokens=1), {}),
    ],
)
def test_damaged_scores_are_no_answer(params, options):
    damaged = make_model()
    with torch.no_grad():
        damaged.norm.weight[0] = float("nan")
    sequence = make_sequence(PROMPTS[0], params, **options)
    run_to_end(make_engine(damaged), sequence)
    assert isinstance(sequence.error, CheckpointError)


def test_a_decoder_that_fails_ends_its_own_request(model, alone):
    engine = make_engine(model)
    sequences = [make_sequence(prompt) for prompt in PROMPTS]
    broken = make_sequence(PROMPTS[1])

    def fail(token_id):
        raise RequestError("no text")

    broken.answer._text_output._decoder.push = fail
    run_to_end(engine, *sequences, broken)
    assert str(broken.error) == "no text"
    assert [list(s.build_completion().token_ids) for s in sequences] == alone


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 50, 100, 200])
def test_an_allocation_that_is_refused_ends_requests_and_not_the_engine(
    model, alone, monkeypatch, call
):
    """K10."""
    engine = make_engine(model)
    break_at(monkeypatch, BlockManager, "_allocate", call, MemoryError("refused"))
    for _ in range(12):
        sequences = [make_sequence(prompt) for prompt in PROMPTS]
        run_to_end(engine, *sequences)
        for sequence, expected in zip(sequences, alone, strict=True):
            if sequence.error is None:
                assert list(sequence.build_completion().token_ids) == expected


def test_siblings_of_a_failed_prompt_fail_with_it(model, monkeypatch):
    engine = make_engine(model)
    break_at(monkeypatch, ModelRunner, "run", 1, RuntimeError("odd"))
    sequences = make_sequences(PROMPTS[0], SamplingParams(n=3, max_tokens=4))
    engine.add(sequences[0])
    assert set(engine.step()) == set(sequences)
    assert {s.finish_reason for s in sequences} == {"error"}
    assert engine.num_unfinished == 0


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("victim", [0, 1])
def test_siblings_go_on_without_the_one_that_left(model, num_steps, victim):
    """K11, E14: cancelled in the queue, before and after the fork."""
    params = SamplingParams(n=3, max_tokens=8, seed=4)
    prompt = PROMPTS[2]
    expected = make_sequences(prompt, params)
    reference = make_engine(model)
    reference.add(expected[0])
    while reference.num_unfinished:
        reference.step()
    engine = make_engine(model, max_num_batched_tokens=16, max_num_seqs=4, max_num_steps=1)
    sequences = make_sequences(prompt, params)
    engine.add(sequences[0])
    for _ in range(num_steps):
        engine.step()
    engine.abort(sequences[victim])
    while engine.num_unfinished:
        engine.step()
        engine.check_integrity()
    assert engine.num_cache_bytes == 0
    for i in range(3):
        if i != victim:
            assert (
                sequences[i].build_completion().token_ids
                == expected[i].build_completion().token_ids
            )
    assert sequences[victim].finish_reason == "abort"


def test_a_request_that_never_fits_is_refused_at_once(model):
    engine = make_engine(model, kv_cache_memory_bytes=count_pool_bytes(model, 3))
    with pytest.raises(CapacityError, match=r"take 60 tokens \(4 blocks of 16\)"):
        engine.add(make_sequence([1] * 48, GREEDY))
    run_to_end(engine, make_sequence([1] * 36, GREEDY))
