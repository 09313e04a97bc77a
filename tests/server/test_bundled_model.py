"""`tramontane serve` as people run it, with the bundled model, and the official clients."""

import re
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from mistralai.client import Mistral

from tests.server.bundled import KEYS, serve_bundled
from tests.server.sse import read_events
from tramontane import LLM, SamplingParams
from tramontane.engine.bundled import is_bundled_model_there

pytestmark = pytest.mark.skipif(not is_bundled_model_there(), reason="no bundled model")
STORY = "Once upon a time there was a little fox"
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serve_bundled(tmp_path_factory.mktemp("keys") / "keys") as server:
        yield server


@pytest.fixture(scope="module")
def llm():
    return LLM()


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=served.url + "/v1", api_key=KEYS[0], max_retries=0) as client:
        yield client


def test_the_answer_is_the_models(served, llm):
    """What the server says is what the Python interface says."""
    expected = llm.generate(STORY, SamplingParams(**GREEDY))
    choice = served.complete(STORY, **GREEDY, return_token_ids=True).json()["choices"][0]
    assert choice["text"] == expected.text
    assert choice["token_ids"] == list(expected.token_ids)
    chat = served.post("/v1/chat/completions", messages=[{"role": "user", "content": STORY}],
                       **GREEDY).json()  # fmt: skip
    assert chat["choices"][0]["message"]["content"] == expected.text
    assert chat["usage"]["cost"]["active_parameters"] == 9_059_584
    assert chat["usage"]["cost"]["flops"] > 2 * 9_059_584 * 24


def test_openai_drives_it(client):
    """A31"""
    whole = client.chat.completions.create(
        model="fox", messages=[{"role": "user", "content": STORY}], logprobs=True, top_logprobs=3,
        **GREEDY,
    )  # fmt: skip
    chunks = list(client.chat.completions.create(
        model="fox", messages=[{"role": "user", "content": STORY}], stream=True,
        stream_options={"include_usage": True}, **GREEDY,
    ))  # fmt: skip
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24
    for entry in whole.choices[0].logprobs.content:
        assert entry.token == entry.top_logprobs[0].token  # greedy takes the likeliest
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    vector = client.embeddings.create(model="fox", input=STORY, dimensions=8).data[0].embedding
    assert sum(x * x for x in vector) == pytest.approx(1, abs=1e-4)
    assert client.models.retrieve("fox").id == "fox"


def test_mistral_drives_it(served):
    """A31, and `random_seed` gives one answer under load."""
    messages = [{"role": "user", "content": STORY}]
    with Mistral(server_url=served.url, api_key=KEYS[0]) as client:

        def ask(seed: int) -> str:
            fields = {"temperature": 0.9, "max_tokens": 16, "random_seed": seed}
            answer = client.chat.complete(model="fox", messages=messages, **fields)
            return answer.choices[0].message.content

        alone = ask(7)
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(ask, [7, 1, 7, 2, 3, 7, 4, 5]))
        assert [together[i] for i in (0, 2, 5)] == [alone] * 3
        assert len(set(together)) == 6
        events = list(client.chat.stream(model="fox", messages=messages, temperature=0,
                                         max_tokens=8))  # fmt: skip
        assert events[-1].data.choices[0].finish_reason == "length"


def test_answers_in_a_crowd_are_those_alone(served, llm):
    """A04"""
    prompts = [f"The number {number} went to the market and" for number in range(40)]
    fields = {"temperature": 0, "max_tokens": 12}
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda p: served.complete(p, **fields).json(), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = llm.generate(prompt, SamplingParams(**fields)).text
        assert answer["choices"][0]["text"] == expected


def test_a_key_sees_no_other_keys_prefixes(served):
    """A03"""
    prompt = "A long prompt that fills some blocks of the cache. " * 8
    other = {"authorization": f"Bearer {KEYS[1]}"}

    def ask(headers=None, **fields) -> int:
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, **fields}
        usage = served.client.post("/v1/completions", json=body, headers=headers).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert ask() == 0
    assert ask() > 0
    assert ask(other) == 0
    assert ask(other) > 0
    assert ask(cache_salt="mine") == 0


def test_stop_texts_and_streams_agree(served):
    """A16"""
    fields = {"temperature": 0, "max_tokens": 60}
    text = served.complete(STORY, **fields).json()["choices"][0]["text"]
    stop = text[30:34]
    choice = served.complete(STORY, stop=stop, **fields).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    events, _ = read_events(served.complete(STORY, stop=stop, stream=True, **fields))
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]


def test_routing_of_every_token(served):
    answer = served.complete(STORY, return_routing="all", seed=1, max_tokens=6).json()
    (choice,) = answer["choices"]
    assert "".join(piece["text"] for piece in choice["routing"]) == choice["text"]
    prompt = choice["prompt_routing"]
    assert "".join(piece["text"] for piece in prompt) == "<s>" + STORY
    for piece in [*prompt, *choice["routing"][:-1]]:
        assert [len(layer) for layer in piece["experts"]] == [2] * 6
        for layer in piece["weights"]:
            assert sum(layer) == pytest.approx(1, abs=1e-3)
    assert choice["routing"][-1]["experts"] is None
    one = served.complete(STORY, return_routing="answer", experts_per_token=1, max_tokens=3).json()
    assert [len(layer) for layer in one["choices"][0]["routing"][0]["experts"]] == [1] * 6
    assert one["usage"]["cost"]["active_parameters"] < 9_059_584


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("structured_outputs", {"regex": r" [a-z]{3}\."}, r" [a-z]{3}\."),
        ("structured_outputs", {"choice": [" yes", " no"]}, " yes| no"),
        ("guided_regex", "[0-9]{4}", "[0-9]{4}"),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
         r'\s*\{\s*"a"\s*:\s*[12]\s*\}\s*'),
    ],
)  # fmt: skip
def test_answers_have_the_form_that_was_asked_for(served, field, value, pattern):
    pytest.importorskip("llguidance")
    choice = served.complete(STORY, **{field: value}, max_tokens=60, seed=3).json()["choices"][0]
    assert re.fullmatch(pattern, choice["text"]), choice


def test_a_form_that_cannot_be_is_refused(served):
    """A13"""
    pytest.importorskip("llguidance")
    for outputs in ({"regex": "("}, {"grammar": "start: nothing_that_exists"},
                    {"json": {"$ref": "#/nowhere"}}):  # fmt: skip
        for stream in (False, True):
            response = served.complete(STORY, structured_outputs=outputs, stream=stream)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_engine(served, stream):
    """E14, against the engine's own counts."""
    body = {"prompt": STORY, "max_tokens": 900, "ignore_eos": True, "n": 4, "stream": stream}
    if stream:
        with served.client.stream("POST", "/v1/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx2.ReadTimeout):
            served.client.post("/v1/completions", json=body, timeout=0.3)
    served.require_idle()


def test_the_context_is_the_models(served):
    """A12"""
    usage = served.complete("x", max_tokens=1020, ignore_eos=True, temperature=0).json()["usage"]
    assert usage["total_tokens"] <= 1024
    for fields in ({"max_tokens": 1024}, {"prompt": [5] * 1024}, {"prompt": [5] * 10_240}):
        error = served.post("/v1/completions", **{"prompt": "x", **fields}).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "1024" in error["message"]
