"""The official clients of OpenAI and Mistral, unchanged, against a real server.

The engine is the fake one; test_bundled_model.py repeats this with a model.
"""

import json
import time

import httpx2
import openai
import pytest
from mistralai.client import Mistral
from mistralai.client import errors as mistral_errors

from tests.server.fake_engine import FakeEngine
from tests.server.live import run_live
from tramontane.errors import EngineError
from tramontane.server.safety import SAFE_PROMPT
from tramontane.tokenizer.mistral_format import MistralFormat

KEY = "key-0123456789abcdef"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def live():
    with run_live(lambda: FakeEngine(chat_format=MistralFormat(1)), api_keys=(KEY,)) as server:
        yield server


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def mistral(live):
    with Mistral(server_url=live.url, api_key=KEY) as client:
        yield client


def test_openai_chat(client):
    """A31"""
    answer = client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=5, n=2, logprobs=True, top_logprobs=2,
    )  # fmt: skip
    assert len(answer.choices) == 2
    choice = answer.choices[0]
    assert len(choice.message.content) == 5
    assert choice.finish_reason == "length"
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert answer.usage.completion_tokens == 10
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.model_extra["cost"]["active_parameters"] == 6000


def test_openai_stream(client):
    """A31: usage chunk, finish_reason, [DONE]."""
    whole = client.chat.completions.create(model="fake", messages=MESSAGES, max_tokens=6)
    stream = client.chat.completions.create(
        model="fake", messages=MESSAGES, max_tokens=6, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_openai_stream_helper(client):
    """It raises for an answer that was cut, so this one stops."""
    fields = {"model": "fake", "messages": MESSAGES, "max_tokens": 400, "stop": ["e"]}
    with client.chat.completions.stream(**fields) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].finish_reason == "stop"
    whole = client.chat.completions.create(**fields)
    assert completion.choices[0].message.content == whole.choices[0].message.content


def test_openai_completions(client):
    answer = client.completions.create(
        model="fake", prompt=[[1, 100, 101], [1, 102]], echo=True, logprobs=1, max_tokens=1
    )
    first, second = answer.choices
    assert first.text.startswith("ab")
    assert first.logprobs.token_logprobs[0] is None
    assert len(first.logprobs.tokens) == 4
    assert second.logprobs.text_offset[0] == 0
    stream = client.completions.create(model="fake", prompt="Hi", max_tokens=3, stream=True)
    assert len("".join(chunk.choices[0].text for chunk in stream)) == 3


def test_openai_embeddings(client):
    """The client asks for base64 unless told."""
    by_default = client.embeddings.create(model="fake", input=["a", "bc"])
    as_numbers = client.embeddings.create(model="fake", input=["a", "bc"], encoding_format="float")
    for number in (0, 1):
        ours, theirs = by_default.data[number].embedding, as_numbers.data[number].embedding
        assert ours == pytest.approx(theirs, abs=1e-7)
    assert by_default.usage.prompt_tokens == 5


def test_openai_models(client):
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").object == "model"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"temperature": 9}, openai.BadRequestError),
        ({"model": "other"}, openai.NotFoundError),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
         openai.BadRequestError),
    ],
)  # fmt: skip
def test_openai_errors(client, fields, error):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "fake", "messages": MESSAGES, **fields})
    (name,) = fields
    assert caught.value.param == name
    assert caught.value.request_id


def test_openai_wrong_key(live):
    with openai.OpenAI(base_url=live.url + "/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"


def test_openai_sees_an_error_within_a_stream():
    with run_live(lambda: FakeEngine(failures={2: EngineError("a step failed")})) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="a step failed"):
            list(stream)
        client.close()


def test_openai_tries_again_when_it_is_told_to():
    with run_live(rate_limit=60) as server:
        server.state.limits._buckets[""] = (0.9, time.monotonic())
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=1)
        answer = client.completions.create(model="fake", prompt="Hi", max_tokens=1)
        assert answer.choices[0].text
        client.close()


def test_mistral_chat(mistral):
    """A31"""
    answer = mistral.chat.complete(
        model="fake", messages=MESSAGES, max_tokens=5, random_seed=4, safe_prompt=False
    )
    assert len(answer.choices[0].message.content) == 5
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    again = mistral.chat.complete(model="fake", messages=MESSAGES, max_tokens=5, random_seed=4)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_mistral_stream(mistral):
    events = list(mistral.chat.stream(model="fake", messages=MESSAGES, max_tokens=5))
    text = "".join(event.data.choices[0].delta.content or "" for event in events)
    assert len(text) == 5
    assert events[-1].data.choices[0].finish_reason == "length"


def test_mistral_safe_prompt(mistral, live):
    """S-08: the prefix is the system's text, in the ids of Mistral's format."""
    mistral.chat.complete(model="fake", messages=MESSAGES, max_tokens=1, safe_prompt=True)
    system = {"role": "system", "content": SAFE_PROMPT}
    expected = MistralFormat(1).encode([system, *MESSAGES], live.engine.tokenizer)
    assert list(live.engine.requests[-1].prompt_ids) == expected


def test_mistral_prefix(mistral, live):
    messages = [*MESSAGES, {"role": "assistant", "content": "Sure", "prefix": True}]
    mistral.chat.complete(model="fake", messages=messages, max_tokens=1)
    expected = MistralFormat(1).encode(messages, live.engine.tokenizer, continue_final=True)
    assert list(live.engine.requests[-1].prompt_ids) == expected


def test_mistral_embeddings_and_models(mistral):
    answer = mistral.embeddings.create(model="fake", inputs=["a", "b"])
    assert [item.index for item in answer.data] == [0, 1]
    assert len(answer.data[0].embedding) == 16
    (card,) = mistral.models.list().data
    assert card.id == "fake"
    assert card.capabilities.completion_chat
    assert mistral.models.retrieve(model_id="fake").max_context_length == 512


def test_mistral_errors(mistral):
    with pytest.raises(mistral_errors.SDKError) as caught:
        mistral.chat.complete(model="fake", messages=MESSAGES, temperature=9)
    assert caught.value.status_code == 400
    with pytest.raises(mistral_errors.SDKError, match="fill in the middle"):
        mistral.fim.complete(model="fake", prompt="def f(", suffix=")")


def test_mistrals_first_client(live):
    """S-08: what mistralai 0.0.x sent in December 2023, and what it looked for in the answer."""
    body = {"model": "fake", "messages": MESSAGES, "safe_mode": True, "random_seed": 1,
            "temperature": 0.7, "max_tokens": 4, "top_p": 1}  # fmt: skip
    headers = {"Accept": "application/json", "Authorization": f"Bearer {KEY}"}
    url = live.url + "/v1/chat/completions"
    answer = httpx2.post(url, json=body, headers=headers).json()
    assert answer["object"] != "error"
    assert {"id", "object", "created", "model", "choices", "usage"} <= answer.keys()
    lines = httpx2.post(url, json={**body, "stream": True}, headers=headers).text.split("\n")
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    deltas = [json.loads(text)["choices"][0]["delta"] for text in data[:-1]]
    assert deltas[0]["role"] == "assistant"
    assert (
        "".join(delta.get("content", "") for delta in deltas)
        == (answer["choices"][0]["message"]["content"])
    )
    error = httpx2.post(url, json={**body, "top_p": 7}, headers=headers).json()
    assert (error["object"], bool(error["message"])) == ("error", True)
