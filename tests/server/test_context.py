"""A12: prompts at the edge of the context, and beyond where a window of 4,096 would end."""

import pytest
import torch

from tests.model_folder import VOCAB_SIZE, save_tiny_model
from tests.oracles.hf import to_hf_model
from tests.server.live import run_real
from tests.tiny import make_tokens
from tramontane import LLM

CONTEXT = 4096


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_seq_len=CONTEXT)
    with run_real(folder, limits={"max_num_seqs": 4}) as server:
        yield server


def make_ids(count: int) -> list[int]:
    return [1, *(3 + make_tokens(count - 1, seed=count, vocab_size=VOCAB_SIZE - 3)).tolist()]


def ask(live, route: str, count: int, max_tokens: int, *, stream: bool = False):
    """A request whose prompt has `count` tokens: ids, a text, or a conversation."""
    fields = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    if route == "ids":
        return live.complete(make_ids(count), **fields)
    text = "x" * (count - 1)  # <s> comes before it
    return live.complete(text, **fields) if route == "text" else live.chat(text, **fields)


@pytest.mark.parametrize("route", ["ids", "text", "chat"])
@pytest.mark.parametrize(
    ("count", "max_tokens"),
    [(CONTEXT - 2, 2), (CONTEXT - 1, 1), (CONTEXT - 1, 2), (CONTEXT, 1), (CONTEXT + 1, 1),
     (10 * CONTEXT, 1), (1, CONTEXT)],
)  # fmt: skip
def test_a12_a_prompt_fits_or_both_numbers_are_named(live, route, count, max_tokens):
    if (route, count) == ("chat", 1):
        count, max_tokens = 2, CONTEXT - 1  # a conversation has a text
    response = ask(live, route, count, max_tokens)
    if count + max_tokens <= CONTEXT:
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (count, max_tokens)
        assert response.json()["choices"][0]["finish_reason"] == "length"
        return
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == ("messages" if route == "chat" else "prompt")
    assert str(count) in error["message"] or count > 16_384  # then the least that it may have
    assert str(CONTEXT) in error["message"]
    assert ask(live, route, count, max_tokens, stream=True).status_code == 400


@pytest.mark.parametrize("count", [CONTEXT - 1, CONTEXT, CONTEXT + 1])
def test_a12_a_prompt_that_is_only_read_may_fill_the_context(live, count):
    """Its embedding, and the scores of its tokens."""
    ids = make_ids(count)
    embedding = live.post("/v1/embeddings", input=ids)
    scores = live.complete(ids, max_tokens=0, echo=True, logprobs=0)
    if count > CONTEXT:
        for response in (embedding, scores):
            assert response.json()["error"]["code"] == "context_length_exceeded"
        return
    assert embedding.json()["usage"]["prompt_tokens"] == count
    assert len(scores.json()["choices"][0]["logprobs"]["token_logprobs"]) == count


def test_a12_an_answer_without_a_limit_ends_with_the_context(live):
    body = live.chat("x" * (CONTEXT - 9), max_tokens=None, ignore_eos=True).json()
    assert body["usage"]["total_tokens"] == CONTEXT
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "long", max_seq_len=2 * CONTEXT)
    with run_real(folder, limits={"max_num_seqs": 4}) as server:
        yield server, to_hf_model(LLM(folder).model)


@pytest.mark.parametrize("count", [CONTEXT - 1, CONTEXT, CONTEXT + 1])
def test_a12_a_longer_context_has_no_edge_at_4096(long, count):
    """The answer is transformers', token for token."""
    live, oracle = long
    ids = make_ids(count)
    answer = live.complete(
        ids, max_tokens=4, temperature=0, ignore_eos=True, return_token_ids=True
    ).json()["choices"][0]
    with torch.inference_mode():
        scores = oracle(torch.tensor([ids + answer["token_ids"]])).logits[0, count - 1 : -1]
    assert scores.argmax(dim=1).tolist() == answer["token_ids"]
