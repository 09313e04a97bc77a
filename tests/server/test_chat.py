import base64
import io
import json

import numpy as np
import pytest

from tests.server.fake_engine import E, FakeEngine, K, L, make_facts
from tests.server.live import LiveServer, run_live
from tests.server.sse import read_events
from tramontane.errors import RequestError
from tramontane.tokenizer.mistral_format import MistralFormat


def test_an_answer_has_openais_shape(server):
    body = server.chat("Hello", max_tokens=5).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": choice["message"]["content"], "refusal": None,
    }  # fmt: skip
    assert len(choice["message"]["content"]) == 5
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"stop": ["a", "e"]}, {"max_tokens": 1}])
def test_usage_adds_up(server, fields):
    """A41"""
    usage = server.chat("Hello", seed=1, **fields).json()["usage"]
    assert usage["prompt_tokens"] == len("Hello") + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stop": "e"}, {"logprobs": True}])
def test_a_stream_says_what_an_answer_says(server, fields):
    """A16, A31"""
    whole = server.chat("Tell me", max_tokens=40, seed=3, **fields).json()
    events, last = read_events(server.chat("Tell me", max_tokens=40, seed=3, stream=True, **fields))
    assert last == "[DONE]"
    for number, choice in enumerate(whole["choices"]):
        chunks = [e["choices"][0] for e in events if e["choices"][0]["index"] == number]
        assert chunks[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        assert text == choice["message"]["content"]
        assert [c["finish_reason"] for c in chunks if c["finish_reason"]] == [
            choice["finish_reason"]
        ]
        assert chunks[-1]["delta"] == {}
        if "logprobs" in fields:
            content = [entry for c in chunks if c["logprobs"] for entry in c["logprobs"]["content"]]
            assert content == choice["logprobs"]["content"]
    assert all("usage" not in event for event in events)


def test_the_usage_chunk_is_the_last(server):
    response = server.chat(stream=True, stream_options={"include_usage": True}, max_tokens=3)
    events, _ = read_events(response)
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 3
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"


def test_stop_texts_are_never_sent(server):
    """A16"""
    text = server.chat("Go", max_tokens=60, seed=5).json()["choices"][0]["message"]["content"]
    stop = text[20:23]
    choice = server.chat("Go", max_tokens=60, seed=5, stop=[stop]).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    events, _ = read_events(server.chat("Go", max_tokens=60, seed=5, stop=[stop], stream=True))
    streamed = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert streamed == text[: text.index(stop)]


def test_fields_reach_the_engine(server):
    server.chat(
        temperature=0.5, top_p=0, top_k=5, min_p=0.1, presence_penalty=1, frequency_penalty=-1,
        repetition_penalty=1.5, random_seed=9, stop="zzz", stop_token_ids=[7], min_tokens=2, n=2,
        logit_bias={"5": -100}, allowed_token_ids=[100, 101], logprobs=True, top_logprobs=3,
        experts_per_token=1, ignore_eos=True, include_stop_str_in_output=True,
        max_completion_tokens=4, max_tokens=9, response_format={"type": "json_object"},
    )  # fmt: skip
    params = server.engine.requests[-1].params
    assert (params.temperature, params.top_k, params.min_p) == (0.5, 5, 0.1)
    assert 0 < params.top_p < 1e-300  # the likeliest alone
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert (params.repetition_penalty, params.seed, params.stop) == (1.5, 9, ("zzz",))
    assert (params.stop_token_ids, params.min_tokens, params.n) == ((7,), 2, 2)
    assert (dict(params.logit_bias), params.allowed_token_ids) == ({5: -100}, (100, 101))
    assert (params.logprobs, params.experts_per_token, params.max_tokens) == (3, 1, 4)
    assert params.ignore_eos
    assert params.include_stop
    assert params.constraint.kind == "json_object"


def test_defaults_are_the_models_then_openais():
    with run_live(lambda: FakeEngine(generation_overrides={"top_p": 0.9, "max_tokens": 7})) as live:
        live.chat(max_tokens=None)
        params = live.engine.requests[-1].params
        assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 0.9, 7)
        assert live.client.get("/props").json()["generation_config_overrides"] == {
            "top_p": 0.9, "max_tokens": 7,
        }  # fmt: skip


def test_without_max_tokens_the_context_is_the_limit(server):
    assert server.chat("Hello", max_tokens=None).json()["usage"]["total_tokens"] == 512


@pytest.mark.parametrize("field", ["continue_final_message", "prefix"])
def test_an_assistants_message_is_continued(server, field):
    """S-08"""
    last = {"role": "assistant", "content": "Once"}
    fields = {field: True}
    if field == "prefix":
        last, fields = {**last, "prefix": True}, {}
    messages = [{"role": "user", "content": "Tell"}, last]
    assert server.chat(messages=messages, **fields).status_code == 200
    assert server.engine.tokenizer.decode(server.engine.requests[-1].prompt_ids) == "Tell\n\nOnce"
    refused = server.chat(messages=[messages[0], {"role": "assistant", "content": "Once"}])
    assert refused.json()["error"]["param"] == "messages.1"


def test_parts_of_text_are_joined(server):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    server.chat(messages=[{"role": "user", "content": parts}])
    assert server.engine.tokenizer.decode(server.engine.requests[-1].prompt_ids) == "Hello"


def test_the_chat_format_writes_the_prompt():
    """A05: names of control tokens in a message are text; there is one <s>."""
    text = "[INST] </s> <s> [/INST]"
    with run_live(lambda: FakeEngine(chat_format=MistralFormat(1))) as live:
        live.chat(text)
        request = live.engine.requests[-1]
        expected = MistralFormat(1).encode(
            [{"role": "user", "content": text}], live.engine.tokenizer
        )
        assert list(request.prompt_ids) == expected
        assert list(request.prompt_ids).count(live.engine.tokenizer.bos_id) == 1
        assert request.starts_text
        messages = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
        assert live.chat(messages=messages).status_code == 400
        refused = live.chat(messages=[{"role": "user", "content": "a"}] * 2)
        assert refused.status_code == 200  # messages in a row are joined
        roles = ("user", "assistant", "system", "user")
        error = live.chat(messages=[{"role": r, "content": r} for r in roles]).json()["error"]
        assert error["param"] == "messages"
        assert "message 2" in error["message"]


def test_routing_comes_with_each_token(server):
    body = server.chat("Hi", max_tokens=4, seed=1, return_routing="all").json()
    (choice,) = body["choices"]
    assert "".join(piece["text"] for piece in choice["routing"]) == choice["message"]["content"]
    first = len("Hi") + 1
    expected = [[(first + layer) % E, (first + layer + 1) % E] for layer in range(L)]
    assert choice["routing"][0]["experts"] == expected
    assert choice["routing"][0]["weights"] == [[0.75, 0.25]] * L
    assert [piece["text"] for piece in choice["prompt_routing"]] == ["<s>", "H", "i"]
    events, _ = read_events(
        server.chat("Hi", max_tokens=4, seed=1, return_routing="all", stream=True)
    )
    deltas = [event["choices"][0]["delta"] for event in events]
    streamed = [piece for delta in deltas for piece in delta.get("routing", [])]
    assert streamed == choice["routing"]
    assert events[-1]["choices"][0]["prompt_routing"] == choice["prompt_routing"]
    assert server.engine.requests[-1].routing == "all"


def test_routed_experts_are_a_npy():
    with run_live(enable_return_routed_experts=True) as live:
        choice = live.chat("Hello", max_tokens=4, routed_experts_prompt_start=2).json()["choices"][
            0
        ]
        data = base64.b64decode(choice["routed_experts"])
        experts = np.load(io.BytesIO(data), allow_pickle=False)
        assert experts.shape == (6 + 4 - 1 - 2, L, K)
        assert experts.dtype == np.int16


@pytest.mark.parametrize("field", ["experts_per_token", "return_routing"])
def test_a_dense_model_has_no_experts(field):
    facts = make_facts(num_experts=None, num_experts_per_tok=None)
    with run_live(lambda: FakeEngine(model=facts), enable_return_routed_experts=True) as live:
        error = live.chat(**{field: 2 if field == "experts_per_token" else "all"}).json()["error"]
        assert error["param"] == field
        assert "dense" in error["message"]
        assert "routed_experts" not in live.chat().json()["choices"][0]


def test_token_ids_on_request(server):
    body = server.chat("Hi", max_tokens=3, return_token_ids=True).json()
    assert body["prompt_token_ids"] == [1, 3 + ord("H"), 3 + ord("i")]
    ids = body["choices"][0]["token_ids"]
    assert server.engine.tokenizer.decode(ids) == body["choices"][0]["message"]["content"]
    events, _ = read_events(server.chat("Hi", max_tokens=3, return_token_ids=True, stream=True))
    assert [i for event in events for i in event["choices"][0].get("token_ids", [])] == ids


def test_prompt_logprobs_in_both_dialects(server):
    for fields in ({"prompt_logprobs": 2}, {"prompt_logprobs": True, "top_prompt_logprobs": 2}):
        logprobs = server.chat("Hi", **fields).json()["prompt_logprobs"]
        assert logprobs[0] is None
        assert logprobs[1][str(3 + ord("H"))] == {
            "logprob": -0.5, "rank": 1, "decoded_token": "H",
        }  # fmt: skip
        assert len(logprobs[1]) == 2


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "object"}}}}, "json_schema", '{"type": "object"}'),
        ({"structured_outputs": {"json": {"a": 1}}}, "json_schema", '{"a": 1}'),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a", "b"]'),
        ({"structured_outputs": {"grammar": "start: x"}}, "grammar", "start: x"),
        ({"guided_json": '{"a": 1}'}, "json_schema", '{"a": 1}'),
        ({"guided_choice": ["x"]}, "choice", '["x"]'),
    ],
)  # fmt: skip
def test_constraints_in_all_dialects(server, fields, kind, source):
    response = server.chat(**fields)
    constraint = server.engine.requests[-1].params.constraint
    assert (constraint.kind, constraint.source) == (kind, source)
    assert ("warning" in response.headers) == any(name.startswith("guided") for name in fields)


def test_a_constraint_that_cannot_be_compiled_is_the_clients_error():
    """A13: found before the answer begins, or while it runs."""
    error = RequestError("the regex does not compile")
    with run_live(lambda: FakeEngine(failures={0: error})) as live:
        for stream in (False, True):
            response = live.chat(structured_outputs={"regex": "("}, stream=stream)
            assert response.status_code == 400
            assert response.json()["error"]["message"] == str(error)
    with run_live(lambda: FakeEngine(refusal=error)) as live:
        assert live.chat(structured_outputs={"regex": "("}).status_code == 400


def test_a_single_message_object_is_refused_clearly(server: LiveServer):
    """S-08: the example of the first announcement sends an object where a list belongs."""
    error = server.chat(messages={"role": "user", "content": "x"}).json()["error"]
    assert error["param"] == "messages"
    assert "list" in error["message"]


def test_messages_are_json_whatever_they_hold(server):
    text = 'quote " back \\ line\n\u2028 emoji \U0001f468\u200d\U0001f469\u200d\U0001f467 \x00'
    response = server.complete(text, echo=True, max_tokens=1)
    assert json.loads(response.content)["choices"][0]["text"].startswith(text)
