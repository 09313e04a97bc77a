import json
from dataclasses import replace

import pytest
import torch

from tests.model_folder import VOCAB_SIZE, make_tokenizer, save_tiny_model
from tests.oracles.hf import to_hf_model
from tests.tiny import make_config, make_model
from tramontane import LLM, SamplingParams
from tramontane.checkpoint.writer import save_model
from tramontane.engine import bundled
from tramontane.errors import (
    CheckpointError,
    ContextError,
    RequestError,
    TokenizerError,
    TramontaneError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=20)
PROMPTS = ["Once upon a time", "x", "\u00c9t\u00e9 \U0001f600"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder)


def test_answers_equal_transformers_generate(llm):
    hf_model = to_hf_model(llm.model)
    for prompt in PROMPTS:
        ids = torch.tensor([llm.tokenizer.encode(prompt, bos=True)])
        oracle = hf_model.generate(
            ids, max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        completion = llm.generate(prompt, GREEDY)
        assert list(completion.token_ids) == oracle[0, ids.shape[1] :].tolist()
        assert completion.num_prompt_tokens == ids.shape[1]
        assert completion.text == llm.tokenizer.decode(completion.token_ids)


def test_a_list_gives_a_list_equal_to_each_alone(llm):
    alone = [llm.generate(prompt, GREEDY) for prompt in PROMPTS]
    together = llm.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert llm.generate([], GREEDY) == []


def test_time_in_each_part_of_the_model(folder, choose_kernels):
    choose_kernels("native")
    llm = LLM(folder)
    assert set(llm.list_kernel_seconds().values()) == {0.0}
    llm.generate("x", GREEDY)
    assert llm.list_kernel_seconds()["experts"] > 0
    choose_kernels("fused")
    assert LLM(folder).list_kernel_seconds() == {}


@pytest.mark.parametrize("budget", [16, 17, 512])
def test_chunked_prefill_gives_the_same_answer(folder, llm, budget):
    prompt = "a long prompt that needs several chunks to run"
    chunked = LLM(folder, max_num_batched_tokens=budget, max_num_seqs=4)
    assert chunked.generate(prompt, GREEDY).token_ids == llm.generate(prompt, GREEDY).token_ids


def test_stream_pieces_are_whole_characters_and_make_up_the_text(llm):
    params = SamplingParams(seed=1, temperature=1.5, max_tokens=200)
    stream = llm.stream("Hello", params)
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == stream.completion.text
    assert stream.completion.token_ids == llm.generate("Hello", params).token_ids
    assert stream.completion.text == llm.tokenizer.decode(stream.completion.token_ids)


def test_streams_may_be_read_in_turn(llm):
    params = [SamplingParams(seed=s, max_tokens=10 + 15 * s) for s in range(2)]
    streams = [llm.stream("Hi", p) for p in params]
    texts = ["", ""]
    iterators = [iter(stream) for stream in streams]
    for turn in range(60):
        piece = next(iterators[turn % 2], None)
        texts[turn % 2] += piece.text if piece else ""
    assert texts == [llm.generate("Hi", p).text for p in params]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_closed_stream_frees_its_cache(llm, temperature):
    params = SamplingParams(temperature=temperature, seed=0, max_tokens=100, ignore_eos=True)
    stream = llm.stream("Hello", params)
    pieces = iter(stream)
    assert [next(pieces).token_id for _ in range(5)] == list(stream.completion.token_ids[:5])
    stream.close()
    assert llm.engine.num_unfinished == 0
    assert stream.completion.finish_reason == "abort"
    assert stream.completion.num_completion_tokens >= 1


def test_timings_and_counts(llm):
    completion = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=5))
    assert completion.num_completion_tokens == len(completion.token_ids) == 5
    assert completion.timings.time_to_first_token > 0
    assert completion.prefill_tokens_per_second > 0
    assert completion.decode_tokens_per_second > 0


def test_routing_is_given_when_asked_for(llm):
    completion = llm.generate("Hello", GREEDY, collect_routing=True)
    ran = completion.num_prompt_tokens + completion.num_completion_tokens - 1
    assert completion.selected_experts.shape == (ran, 2, 2)
    assert llm.generate("Hello", GREEDY).selected_experts is None


@pytest.mark.parametrize("prompt", ["", ["fine", ""], [None]])
def test_empty_prompts_are_refused(llm, prompt):
    with pytest.raises(RequestError, match="not empty"):
        llm.generate(prompt, GREEDY)
    assert llm.engine.num_unfinished == 0


def test_lone_surrogates_are_refused(llm):
    with pytest.raises(TramontaneError, match="surrogate"):
        llm.generate("a\udcff", GREEDY)


def test_prompt_beyond_the_context_is_refused_not_cut(llm):
    with pytest.raises(ContextError, match=r"301 tokens.*holds 256"):
        llm.generate("x" * 300, GREEDY)


def test_control_tokens_in_a_prompt_stay_text(llm):
    completion = llm.generate("</s>", GREEDY)
    assert completion.num_prompt_tokens == 1 + len("</s>")


def test_generation_config_overrides_defaults(tmp_path):
    values = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": [2, 5]}
    llm = LLM(save_tiny_model(tmp_path / "m", generation_config=json.dumps(values)))
    assert llm.default_params == SamplingParams(temperature=0, max_tokens=7)
    assert llm.generation_config.eos_ids == {2, 5}
    assert llm.generate("Hello").num_completion_tokens <= 7


def test_padded_head_is_fine_and_a_small_one_is_not(tmp_path):
    padded = make_model(make_config(vocab_size=VOCAB_SIZE + 61))
    save_model(padded, tmp_path / "padded", tokenizer=make_tokenizer())
    completion = LLM(tmp_path / "padded").generate("Hi", SamplingParams(temperature=5, seed=0))
    assert max(completion.token_ids) < VOCAB_SIZE
    save_model(make_model(), tmp_path / "small", tokenizer=make_tokenizer())
    with pytest.raises(CheckpointError, match=r"259 tokens.*128"):
        LLM(tmp_path / "small")


def test_missing_parts_are_named(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    save_model(make_model(), tmp_path / "mute")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        LLM(tmp_path / "mute")
    monkeypatch.setattr(bundled, "BUNDLED_MODEL", tmp_path)
    with pytest.raises(CheckpointError, match="tramontane run FOLDER"):
        LLM()


def test_without_a_folder_the_bundled_model_runs(folder, monkeypatch):
    monkeypatch.setattr(bundled, "BUNDLED_MODEL", folder)
    assert LLM().origin == str(folder)


def test_a_conversation_is_answered_in_the_models_format(tmp_path, llm):
    folder = save_tiny_model(tmp_path / "m")
    with pytest.raises(TokenizerError, match=r"m has no chat format: looked for chat_template"):
        LLM(folder, use_chat=True)
    with pytest.raises(TokenizerError, match="a model in memory has no chat format"):
        _ = LLM.from_parts(llm.model, llm.tokenizer).chat_format
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1].content }}")
    chat = LLM(folder, use_chat=True)
    stream = chat.stream_chat([{"role": "user", "content": "Hello"}], GREEDY, collect_routing=True)
    assert "".join(piece.text for piece in stream) == stream.completion.text
    assert stream.completion.token_ids == llm.generate("Hello", GREEDY).token_ids
    assert stream.completion.selected_experts is not None
    with pytest.raises(RequestError, match="there are no messages"):
        chat.stream_chat([], GREEDY)


def test_a_model_in_training_can_be_asked_between_steps(llm):
    model = make_model(make_config(vocab_size=VOCAB_SIZE))
    tokens = torch.arange(5)
    answer = LLM.from_parts(model.train(), llm.tokenizer).generate("Test", GREEDY)
    assert answer == replace(llm.generate("Test", GREEDY), timings=answer.timings)
    model.compute_logits(model.forward_packed(tokens, [5]).hidden).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
