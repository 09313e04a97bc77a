"""A request is answered as if alone, whatever runs beside it (rows E01, E12, E30, K01, A04).

With the native kernels the log-probabilities are the same bits too; torch's own sums may depend on
the number of rows, and there the tokens are compared.
"""

import random
from collections.abc import Callable

import pytest
import torch

from tests.engine.sequences import (
    count_pool_bytes,
    finish_all,
    make_engine,
    make_sequence,
    make_sequences,
    run_to_end,
)
from tests.tiny import make_config, make_model, make_tokens
from tramontane import LLM
from tramontane.config import MoeConfig
from tramontane.engine.completion import Completion
from tramontane.engine.sampling_params import SamplingParams
from tramontane.models.transformer import Transformer

PARAMS = [
    SamplingParams(temperature=0, max_tokens=14, logprobs=2),
    SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=20, logprobs=0),
    SamplingParams(temperature=1, top_k=7, repetition_penalty=1.3, seed=6, max_tokens=9,
                   logprobs=1),
    SamplingParams(temperature=0, max_tokens=17, experts_per_token=1, logprobs=1),
    SamplingParams(temperature=0, max_tokens=6, experts_per_token=4, logprobs=1),
    SamplingParams(temperature=0.7, min_p=0.1, presence_penalty=0.5, seed=1, max_tokens=15,
                   logprobs=3, prompt_logprobs=1),
]  # fmt: skip
PROMPTS = [make_tokens(length, seed=length).tolist() for length in (3, 40, 16, 17, 33, 8, 5, 31)]


@pytest.fixture(params=["native", "fused"])
def kernels(request, choose_kernels: Callable[[str], None]) -> str:
    choose_kernels(request.param)
    return request.param


def ask(number: int) -> tuple[list[int], SamplingParams]:
    return PROMPTS[number % len(PROMPTS)], PARAMS[number % len(PARAMS)]


def run_alone(model: Transformer, count: int) -> list[Completion]:
    engine = make_engine(model, use_prefix_cache=False)
    return [finish_all(engine, make_sequence(*ask(i)))[0] for i in range(count)]


def assert_equal(ours: list[Completion], theirs: list[Completion], *, bits: bool) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        if bits:
            assert one.logprobs == other.logprobs
            assert one.prompt_logprobs == other.prompt_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moe", [None, MoeConfig(residual=True)], ids=["dense", "residual"])
def test_a_model_layer_by_layer_has_the_same_bits_too(moe, dtype, choose_kernels):
    """E01: the extension has no such layers as one call."""
    choose_kernels("native")
    model = make_model(make_config(moe=moe, hidden_dim=100)).to(dtype)
    asked = [(PROMPTS[i], params) for i, params in enumerate([*PARAMS[:3], PARAMS[5]] * 2)]
    quiet = make_engine(model, use_prefix_cache=False)
    alone = [finish_all(quiet, make_sequence(*one))[0] for one in asked]
    engine = make_engine(model, max_num_batched_tokens=23, max_num_seqs=8)
    crowd = finish_all(engine, *(make_sequence(*one) for one in asked))
    assert_equal(crowd, alone, bits=True)


@pytest.mark.parametrize("budget", [32, 37, 512])
@pytest.mark.parametrize("window", [None, 24])
def test_a_crowd_of_32_answers_as_each_alone(budget, window, choose_kernels):
    """E01: batch 32, chunks of any size."""
    choose_kernels("native")
    model = make_model(make_config(sliding_window=window))
    alone = run_alone(model, 32)
    engine = make_engine(model, max_num_batched_tokens=budget, max_num_seqs=32)
    crowd = finish_all(engine, *(make_sequence(*ask(i)) for i in range(32)))
    assert_equal(crowd, alone, bits=True)


@pytest.mark.parametrize("window", [None, 24])
def test_a_crowd_of_torchs_kernels(window, choose_kernels):
    choose_kernels("fused")
    model = make_model(make_config(sliding_window=window))
    alone = run_alone(model, 8)
    engine = make_engine(model, max_num_batched_tokens=37, max_num_seqs=8)
    crowd = finish_all(engine, *(make_sequence(*ask(i)) for i in range(8)))
    assert_equal(crowd, alone, bits=False)


def test_forced_preemption_changes_nothing(kernels):
    """E01, E12: half of the blocks that are needed."""
    model = make_model()
    asked = [
        (prompt, SamplingParams(temperature=i % 2, seed=i, max_tokens=60, logprobs=1))
        for i, prompt in enumerate(PROMPTS)
    ]
    plenty = make_engine(model, use_prefix_cache=False)
    alone = [finish_all(plenty, make_sequence(*one, eos_ids=frozenset()))[0] for one in asked]
    engine = make_engine(model, kv_cache_memory_bytes=count_pool_bytes(model, 20))
    crowd = finish_all(engine, *(make_sequence(*one, eos_ids=frozenset()) for one in asked))
    assert engine.get_stats().num_preemptions > 0
    assert_equal(crowd, alone, bits=kernels == "native")


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 33])
def test_a_kept_prefix_changes_nothing(length, kernels):
    """K01: the second request finds the blocks of the first."""
    model = make_model()
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=1)
    prompt = make_tokens(length, seed=1).tolist()
    engine = make_engine(model)
    for tail in ([], [7], [7, 9], list(range(20))):
        expected = finish_all(
            make_engine(model, use_prefix_cache=False), make_sequence(prompt + tail, params)
        )
        found = finish_all(engine, make_sequence(prompt + tail, params))
        assert_equal(found, expected, bits=kernels == "native")
        num_full = (length + len(tail) - 1) // 16 * 16  # the last token always runs
        num_common = length // 16 * 16 if tail else 0
        assert min(num_common, num_full) <= found[0].num_cached_tokens <= num_full


def test_several_answers_to_one_prompt_are_those_of_each_seed(kernels):
    model, prompt = make_model(), PROMPTS[1]
    params = {"temperature": 0.9, "max_tokens": 10, "logprobs": 1}
    alone = [
        finish_all(make_engine(model), make_sequence(prompt, SamplingParams(seed=3 + i, **params)))
        for i in range(5)
    ]
    for limits in ({}, {"max_num_seqs": 2, "max_num_batched_tokens": 16}):
        sequences = make_sequences(prompt, SamplingParams(seed=3, n=5, **params))
        engine = make_engine(model, **limits)
        engine.add(sequences[0])
        while engine.num_unfinished:
            engine.step()
            engine.check_integrity()
        answers = [sequence.build_completion() for sequence in sequences]
        assert [answer.index for answer in answers] == list(range(5))
        assert_equal(answers, [a for [a] in alone], bits=kernels == "native")


def test_routing_is_as_wide_as_the_request_asked(kernels):
    """Beside others with more and with fewer experts per token."""
    model = make_model()
    asked = [None, 1, 4, 2]
    params = [SamplingParams(temperature=0, max_tokens=5, experts_per_token=k) for k in asked]
    alone = [
        finish_all(make_engine(model), make_sequence(PROMPTS[i], p, routing="all"))[0]
        for i, p in enumerate(params)
    ]
    crowd = finish_all(
        make_engine(model, max_num_batched_tokens=24, max_num_seqs=4),
        *(make_sequence(PROMPTS[i], p, routing="all") for i, p in enumerate(params)),
    )
    for together, single, k in zip(crowd, alone, asked, strict=True):
        assert together.selected_experts.shape[2] == (k or 2)
        assert together.selected_experts.tolist() == single.selected_experts.tolist()
        assert together.expert_weights == pytest.approx(single.expert_weights, abs=1e-5)


@pytest.mark.parametrize("limits", [{}, {"max_num_seqs": 2, "max_num_batched_tokens": 16}])
def test_what_is_known_of_the_prompt_is_known_to_all_its_answers(limits, choose_kernels):
    choose_kernels("native")
    model, prompt = make_model(), PROMPTS[4]
    params = SamplingParams(seed=3, n=4, max_tokens=6, prompt_logprobs=1)
    sequences = make_sequences(prompt, params, routing="all", wants_embedding=True)
    engine = make_engine(model, **limits)
    run_to_end(engine, sequences[0])
    answers = [sequence.build_completion() for sequence in sequences]
    for answer in answers:
        assert answer.error is None
        assert answer.prompt_logprobs == answers[0].prompt_logprobs
        assert len(answer.prompt_logprobs) == len(prompt)
        assert answer.embedding.tolist() == pytest.approx(answers[0].embedding.tolist())
        assert len(answer.selected_experts) == len(prompt) + answer.num_completion_tokens - 1
        ran = answer.selected_experts[: len(prompt)]
        assert ran.tolist() == answers[0].selected_experts[: len(prompt)].tolist()


def test_drafts_change_nothing(kernels):
    """Texts that repeat themselves, with and without guessing ahead."""
    model = make_model()
    prompt = [5, 6, 7, 8] * 6
    for params in (
        SamplingParams(temperature=0, max_tokens=60, logprobs=1),
        SamplingParams(temperature=0.3, seed=2, max_tokens=60, logprobs=1),
        SamplingParams(temperature=0.3, seed=2, max_tokens=60, frequency_penalty=0.4, logprobs=1),
    ):
        plain = finish_all(
            make_engine(model),
            make_sequence(prompt, params, routing="all"),
        )
        engine = make_engine(model, max_num_drafts=8)
        drafted = finish_all(engine, make_sequence(prompt, params, routing="all"))
        assert_equal(drafted, plain, bits=kernels == "native")
        assert drafted[0].selected_experts.tolist() == plain[0].selected_experts.tolist()
        stats = engine.get_stats()
        assert stats.num_accepted_drafts <= stats.num_drafts


def test_right_guesses_save_passes():
    """The bundled model goes on with a text that repeats itself, and is guessed to."""
    prompt = "The cat sat on the mat. The dog sat on the mat. " * 4
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    llms = [LLM(max_num_seqs=1), LLM(max_num_seqs=1, max_num_drafts=8)]
    answers = [llm.generate(prompt, params) for llm in llms]
    assert answers[0].token_ids == answers[1].token_ids
    without, with_drafts = (llm.engine.get_stats() for llm in llms)
    assert with_drafts.num_accepted_drafts > 0
    assert with_drafts.num_passes == without.num_passes - with_drafts.num_accepted_drafts


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_equal_one_at_a_time(seed, choose_kernels):
    check_random_schedules(seed, choose_kernels, count=20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 31))
def test_1000_random_schedules_equal_one_at_a_time(seed, choose_kernels):
    """E01, A04: 25 x 40 requests that come and go, in engines of all sizes."""
    check_random_schedules(seed, choose_kernels, count=40)


def check_random_schedules(seed: int, choose_kernels: Callable[[str], None], *, count: int) -> None:
    choose_kernels("native")
    rng = random.Random(seed)
    model = make_model(make_config(sliding_window=rng.choice([None, 20])))
    alone = run_alone(model, count)
    engine = make_engine(
        model,
        max_num_seqs=rng.randint(1, 12),
        max_num_batched_tokens=rng.randint(12, 100),
        kv_cache_memory_bytes=count_pool_bytes(model, rng.randint(8, 40)),
        max_num_drafts=rng.choice([0, 4]),
    )
    waiting = list(range(count))
    rng.shuffle(waiting)
    sequences, disturbers = {}, []
    while waiting or engine.num_unfinished:
        if waiting and rng.random() < 0.5:
            number = waiting.pop()
            sequences[number] = make_sequence(*ask(number))
            engine.add(sequences[number])
        if waiting and rng.random() < 0.2:
            disturbers.append(
                make_sequence(make_tokens(rng.randint(1, 50), seed=rng.randint(0, 9)))
            )
            engine.add(disturbers[-1])
        if disturbers and rng.random() < 0.2:
            engine.abort(rng.choice(disturbers))
        engine.step()
        engine.check_integrity()
    assert engine.num_cache_bytes == 0
    found = [sequences[i].build_completion() for i in range(count)]
    assert_equal(found, alone, bits=True)


@torch.inference_mode()
def test_paged_logprobs_are_those_of_the_whole_sequence(choose_kernels):
    """The paged cache against no cache at all: the same bits."""
    choose_kernels("native")
    model, prompt = make_model(), PROMPTS[1]
    params = SamplingParams(temperature=0, max_tokens=10, logprobs=0, prompt_logprobs=0)
    [answer] = finish_all(make_engine(model), make_sequence(prompt, params))
    tokens = torch.tensor([*prompt, *answer.token_ids])
    hidden = model.forward_packed(tokens, [len(tokens)]).hidden
    scores = torch.log_softmax(model.compute_logits(hidden), dim=-1)
    assert answer.prompt_logprobs is not None
    assert answer.logprobs is not None
    known = [*answer.prompt_logprobs[1:], *answer.logprobs]
    expected = scores[:-1].gather(1, tokens[1:, None]).squeeze(1).tolist()
    assert [item.logprob for item in known if item] == expected
