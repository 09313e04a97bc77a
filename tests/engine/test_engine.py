import numpy as np
import pytest
import torch

from tests.engine.sequences import (
    EOS,
    GREEDY,
    count_pool_bytes,
    finish_all,
    generate,
    make_engine,
    make_sequence,
)
from tests.oracles.hf import to_hf_model
from tests.tiny import make_config, make_model, make_tokens
from tramontane.config import MoeConfig
from tramontane.config.moe import SwitchOptions
from tramontane.engine import kv_cache
from tramontane.engine.engine import Engine
from tramontane.engine.limits import EngineLimits
from tramontane.engine.sampling_params import SamplingParams
from tramontane.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ContextError,
    RequestError,
)
from tramontane.server.routing_json import describe_prompt


def generate_hf(hf_model, prompt, max_new_tokens):
    ids = hf_model.generate(
        prompt[None],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("changes", [{}, {"moe": None}, {"sliding_window": 8}])
@pytest.mark.parametrize("prompt_len", [1, 7, 30])
def test_greedy_equals_transformers_generate(changes, prompt_len):
    model = make_model(make_config(**changes))
    prompt = make_tokens(prompt_len, seed=prompt_len)
    expected = generate_hf(to_hf_model(model), prompt, 40)
    assert generate(model, prompt, SamplingParams(temperature=0, max_tokens=40)) == expected


@pytest.mark.parametrize("budget", [4, 7, 16, 512])
@pytest.mark.parametrize("window", [None, 8])
def test_batch_of_ragged_prompts_equals_each_alone(budget, window):
    model = make_model(make_config(sliding_window=window))
    prompts = [make_tokens(length, seed=length) for length in (1, 3, 9, 20, 33, 5)]
    alone = [generate(model, prompt) for prompt in prompts]
    engine = make_engine(model, max_num_batched_tokens=budget, max_num_seqs=4)
    together = finish_all(engine, *map(make_sequence, prompts))
    assert [list(completion.token_ids) for completion in together] == alone


def test_seed_gives_the_same_answer_in_any_company():
    model = make_model()
    params = SamplingParams(seed=11, max_tokens=15, temperature=1, top_k=20, repetition_penalty=1.2)
    prompt, others = make_tokens(6), [make_tokens(n, seed=n) for n in (2, 15, 40)]
    alone = generate(model, prompt, params)
    company = [make_sequence(p, SamplingParams(temperature=1, max_tokens=20)) for p in others]
    crowd = finish_all(make_engine(model), *company, make_sequence(prompt, params))
    assert list(crowd[-1].token_ids) == alone
    assert generate(model, prompt, params) == alone


def test_generation_stops_at_any_eos_and_keeps_its_id():
    model, prompt = make_model(), make_tokens(5)
    free = generate(model, prompt, eos_ids=frozenset())
    sequence = make_sequence(prompt, eos_ids=frozenset({free[3], 999}))
    [completion] = finish_all(make_engine(model), sequence)
    end = free.index(free[3]) + 1
    assert list(completion.token_ids) == free[:end]
    assert completion.finish_reason == "stop"
    assert completion.text == "".join(chr(100 + token) for token in free[: end - 1])


def test_stop_text_ends_the_answer_and_is_not_in_it():
    model, prompt = make_model(), make_tokens(5)
    text = "".join(chr(100 + token) for token in generate(model, prompt))
    stop = text[4:6]
    params = SamplingParams(temperature=0, max_tokens=12, stop=stop)
    [completion] = finish_all(make_engine(model), make_sequence(prompt, params))
    assert completion.text == text[: text.index(stop)]
    assert completion.finish_reason == "stop"


def test_max_tokens_and_a_full_context_end_with_length():
    model = make_model()
    [completion] = finish_all(
        make_engine(model), make_sequence(make_tokens(5), eos_ids=frozenset())
    )
    assert (completion.num_completion_tokens, completion.finish_reason) == (12, "length")
    sequence = make_sequence(make_tokens(5), eos_ids=frozenset(), max_seq_len=9)
    [completion] = finish_all(make_engine(model), sequence)
    assert (completion.num_completion_tokens, completion.finish_reason) == (4, "length")
    assert completion.num_prompt_tokens == 5


def test_prompt_beyond_the_context_names_both_numbers():
    """A12 at the engine."""
    with pytest.raises(ContextError, match=r"300 tokens.*holds 256"):
        make_sequence([1] * 300)
    with pytest.raises(ContextError):
        make_sequence([1] * 256)
    assert make_sequence([1] * 255).max_len == 256
    assert make_sequence([1] * 256, SamplingParams(max_tokens=0)).max_len == 256


def test_prompt_without_tokens_is_refused():
    with pytest.raises(RequestError, match="no token"):
        make_sequence([])


@pytest.mark.parametrize("budget", [3, 512])
def test_routing_covers_every_token_that_ran(budget):
    model, prompt = make_model(), make_tokens(7)
    sequence = make_sequence(prompt, eos_ids=frozenset(), routing="all")
    engine = make_engine(model, max_num_batched_tokens=budget, max_num_seqs=1)
    [completion] = finish_all(engine, sequence)
    tokens = torch.tensor([*prompt, *completion.token_ids[:-1]])
    with torch.inference_mode():
        routing = model.forward_packed(tokens, [len(tokens)]).routing
    expected = torch.stack([layer.experts for layer in routing], dim=1)
    assert completion.selected_experts.shape == (7 + 12 - 1, 2, 2)
    assert completion.selected_experts.tolist() == expected.tolist()


def test_dense_models_have_no_routing():
    model = make_model(make_config(moe=None))
    [completion] = finish_all(make_engine(model), make_sequence(make_tokens(4), routing="all"))
    assert completion.selected_experts is None


def test_pieces_with_experts_come_when_the_token_has_run():
    model, prompt = make_model(), make_tokens(4)
    sequence = make_sequence(prompt, eos_ids=frozenset(), routing="all")
    engine = make_engine(model)
    engine.add(sequence)
    engine.step()
    assert sequence.take_pieces(with_experts=True) == []
    pieces = []
    while not sequence.is_finished:
        engine.step()
        pieces += sequence.take_pieces(with_experts=True)
    completion = sequence.build_completion()
    assert "".join(piece.text for piece in pieces) == completion.text
    assert [piece.token_id for piece in pieces] == list(completion.token_ids)
    chosen = [piece.selected_experts.tolist() for piece in pieces[:-1]]
    assert chosen == completion.selected_experts[4:].tolist()
    assert pieces[-1].selected_experts is None


def test_tokens_beyond_the_vocabulary_are_never_chosen():
    model, prompt = make_model(), make_tokens(4)
    with torch.no_grad():
        model.output.weight[100:] *= 100
    engine = Engine(model, vocab_size=100, limits=EngineLimits(max_num_seqs=4))
    [completion] = finish_all(engine, make_sequence(prompt, eos_ids=frozenset()))
    assert max(completion.token_ids) < 100 <= max(generate(model, prompt))


def test_abort_frees_the_cache_and_leaves_the_others():
    model = make_model()
    kept, dropped, waiting = (make_sequence(make_tokens(6, seed=s)) for s in range(3))
    engine = make_engine(model, max_num_seqs=2)
    for sequence in (kept, dropped, waiting):
        engine.add(sequence)
    engine.step()
    both = engine.num_cache_bytes
    engine.abort(dropped)
    engine.abort(waiting)
    assert (engine.num_unfinished, engine.num_cache_bytes) == (1, both // 2)
    assert dropped.build_completion().finish_reason == "abort"
    while not kept.is_finished:
        engine.step()
    assert list(kept.build_completion().token_ids) == generate(model, make_tokens(6, seed=0))


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(repetition_penalty=1.1)])
def test_nan_weights_are_reported_and_leave_nothing_behind(params):
    model = make_model()
    with torch.no_grad():
        model.layers[1].attention.wo.weight[0, 0] = float("nan")
    engine, sequence = make_engine(model), make_sequence(make_tokens(3), params)
    with pytest.raises(CheckpointError, match="not finite"):
        finish_all(engine, sequence)
    assert sequence.build_completion().finish_reason == "error"


def test_failed_allocation_names_the_bytes(monkeypatch):
    def refuse(*shape, **options):
        raise RuntimeError("not enough memory")

    model = make_model()
    size = count_pool_bytes(model, 4)
    monkeypatch.setattr(kv_cache.torch, "empty", refuse)
    with pytest.raises(CapacityError, match=rf"64 tokens \({size} bytes\)"):
        make_engine(model, kv_cache_memory_bytes=size)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_num_batched_tokens": 8}, "max_num_batched_tokens is 8"),
        ({"max_waiting": 0}, "max_waiting is 0"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes is 0"),
        ({"max_num_drafts": 100}, "max_num_drafts is 100"),
    ],
)
def test_impossible_limits_are_refused(limits, message):
    with pytest.raises(ConfigError, match=message):
        EngineLimits(**limits)


def test_a_capacity_outside_of_training_is_refused():
    """A token's experts would depend on the requests beside it."""
    options = SwitchOptions(eval_capacity_factor=1.25)
    moe = MoeConfig(router="switch", num_experts_per_tok=1, router_options=options)
    with pytest.raises(ConfigError, match=r"eval_capacity_factor is 1\.25"):
        make_engine(make_model(make_config(moe=moe)))


def test_a_dropped_first_expert_hides_no_second():
    """Of a slot that is empty the place stays."""
    answer = make_sequence([5, 6, 7], routing="all").answer
    experts = np.array([[[-1, 3, -1]], [[2, -1, -1]], [[-1, -1, -1]]], dtype=np.int16)
    answer.record_routing(0, experts, np.abs(experts) / 10)
    completion = answer.build_completion("stop", None)
    assert completion.selected_experts.tolist() == [[[-1, 3]], [[2, -1]], [[-1, -1]]]
    listed = describe_prompt(completion, [5, 6, 7], ["a", "b", "c"])
    assert [piece["experts"] for piece in listed] == [[[3]], [[2]], [[]]]
    assert [piece["weights"] for piece in listed] == [[[0.3]], [[0.2]], [[]]]
