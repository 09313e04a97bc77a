"""Errors have one shape, and say which field is at fault."""

import asyncio
import socket

import httpx2
import pytest
from pydantic import ValidationError

from tests.server.fake_engine import FakeEngine
from tests.server.live import run_live
from tests.server.sse import read_events
from tramontane.errors import (
    CapacityError,
    CheckpointError,
    EngineError,
    OverloadError,
    UnavailableError,
)
from tramontane.server import errors, exchange
from tramontane.server.protocol.chat import ChatRequest
from tramontane.server.protocol.completions import CompletionRequest
from tramontane.server.protocol.embeddings import EmbeddingRequest
from tramontane.server.protocol.tokenizing import DetokenizeRequest, TokenizeRequest


def require_error(response, status, *, code=None, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert (error["code"], error["param"]) == (code, param)
    assert response.json()["object"] == "error"  # what Mistral's first client looks for
    assert response.headers["x-request-id"]
    return error


HUGE = [-1, 2**31, 2**63, 10**9, 10**400]
FINE = [("seed", 2**31), ("seed", 10**9), ("top_k", -1), ("truncate_prompt_tokens", -1)]


@pytest.mark.parametrize("value", [*HUGE, 1.5, "1", True, [1]])
@pytest.mark.parametrize(
    "field",
    ["n", "max_tokens", "min_tokens", "top_logprobs", "top_k", "experts_per_token", "seed",
     "truncate_prompt_tokens"],
)  # fmt: skip
def test_numbers_are_bounded_before_anything_is_built(server, field, value):
    """A10"""
    fields = {"logprobs": True} if field == "top_logprobs" else {}
    if (field, value) in FINE:
        return
    before = len(server.engine.requests)
    error = require_error(server.chat(**{field: value}, **fields), 400, param=field)
    assert field in error["message"]
    assert len(server.engine.requests) == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 10**9}, "best_of"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_tokens": 600, "max_tokens": None}, "min_tokens"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"temperature": float("1e300")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"experts_per_token": 5}, "experts_per_token"),
        ({"seed": 1, "random_seed": 2}, "random_seed"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a" * 70_000}}, "structured_outputs.regex"),
        ({"structured_outputs": {"structural_tag": {"a": 1}}}, "structural_tag"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "prefix": True}] * 2},
         "messages.0.prefix"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)  # fmt: skip
def test_bad_fields_are_named(server, fields, param):
    """A10, A30"""
    if "best_of" in fields:
        require_error(server.complete(**fields), 400, param=param)
    else:
        code = "unsupported_field" if param in ("prompt_logprobs", "structural_tag") else None
        require_error(server.chat(**fields), 400, param=param, code=code)


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [None] * 100_000}),
        (CompletionRequest, {"prompt": [[None] * 100_000]}),
        (CompletionRequest, {"prompt": "x", "stop": [None] * 100_000}),
        (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(100_000)}}),
        (CompletionRequest, {"prompt": "x", "allowed_token_ids": ["x"] * 100_000}),
        (CompletionRequest, {"prompt": "x", "guided_choice": [1] * 100_000}),
        (ChatRequest, {"messages": [None] * 100_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [None] * 100_000}]}),
        (EmbeddingRequest, {"input": [None] * 100_000}),
        (DetokenizeRequest, {"tokens": [None] * 100_000}),
        (TokenizeRequest, {"messages": [None] * 100_000}),
    ],
)
def test_a_long_list_of_mistakes_is_a_few_errors(model, body):
    """A10: an error for each item would take a thousand times the memory of the request."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    assert caught.value.error_count() <= 4


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"chat_template": "{{ messages }}"},
        {"use_beam_search": True},
        {"bad_words": ["x"]},
        {"audio": {"voice": "x"}},
        {"guardrails": [{}]},
        {"echo": True},
    ],
)
def test_what_is_not_served_is_refused_by_name(server, fields):
    """A30: a field that would change the answer is never ignored."""
    (name,) = fields
    require_error(server.chat(**fields), 400, param=name, code="unsupported_field")


def test_tools_that_may_not_be_called_do_not_matter(server):
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert server.chat(tools=tools, tool_choice="none").status_code == 200
    assert server.chat(tools=[], tool_choice="auto", parallel_tool_calls=True).status_code == 200


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}},
        {"type": "image_url", "image_url": "file:///etc/passwd"},
        {"type": "input_audio", "input_audio": {"data": ""}},
        {"type": "text"},
    ],
)
def test_parts_that_are_no_text_are_refused(server, part):
    """A15"""
    content = [{"type": "text", "text": "see"}, part]
    response = server.chat(messages=[{"role": "user", "content": content}])
    require_error(response, 400, param="messages.0.content.1", code="unsupported_content")


def test_addresses_in_a_request_are_not_opened(server):
    """A15: a socket that would notice."""
    with socket.create_server(("127.0.0.1", 0)) as canary:
        url = f"http://127.0.0.1:{canary.getsockname()[1]}/x"
        part = {"type": "image_url", "image_url": {"url": url}}
        assert server.chat(messages=[{"role": "user", "content": [part]}]).status_code == 400
        outputs = {"json": {"$ref": url}}
        for fields in ({"user": url}, {"structured_outputs": outputs}, {"metadata": {"a": url}}):
            assert server.chat(url, **fields).status_code == 200
        canary.settimeout(0.1)
        with pytest.raises(TimeoutError):
            canary.accept()


def test_unknown_fields_are_named_in_a_header(server, caplog):
    response = server.chat(**{"frobnicate": 1, "r\u00e9gime": 2, "a,b": 3, " ": 4, "": 5, "\n": 6})
    assert response.status_code == 200
    names = 'frobnicate, r%C3%A9gime, a%2Cb, %20, "", %0A'
    assert response.headers["x-tramontane-ignored-fields"] == names
    server.chat(frobnicate=1)
    assert sum("frobnicate" in record.getMessage() for record in caplog.records) == 1
    assert "x-tramontane-ignored-fields" not in server.chat(user="x", metadata={}).headers
    response = server.chat(stream=True, stream_options={"include_usage": True, "wish": 1})
    assert response.headers["x-tramontane-ignored-fields"] == "stream_options.wish"
    messages = [{"role": "user", "content": "x", "wish": 1}] * 2
    response = server.chat(messages=messages)
    assert response.headers["x-tramontane-ignored-fields"] == "messages.wish"


def test_a_call_of_a_tool_is_no_empty_answer(server):
    for call in ({"tool_calls": [{}]}, {"function_call": {"name": "f", "arguments": ""}}):
        messages = [
            {"role": "assistant", "content": None, **call},
            {"role": "user", "content": "x"},
        ]
        require_error(
            server.chat(messages=messages), 400, code="unsupported_field", param="messages.0"
        )


def test_half_a_character_is_refused(server):
    """A lone surrogate can stand in JSON, and in no UTF-8."""
    for stream in (False, True):
        require_error(server.chat("\ud800", stream=stream), 400, code="not_encodable",
                      param="messages")  # fmt: skip
    require_error(server.complete("\udfff"), 400, code="not_encodable", param="prompt")
    assert server.chat(**{"\ud800": 1}).status_code == 400


@pytest.mark.parametrize("length", [505, 506, 5000])
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_the_context_is_refused(server, length, stream):
    """A12: the context is 512 tokens; <s> is one, and 6 are asked for."""
    response = server.complete("x" * length, max_tokens=6, stream=stream)
    if length + 7 <= 512:
        assert response.status_code == 200
        return
    error = require_error(response, 400, param="prompt", code="context_length_exceeded")
    assert str(length + 1) in error["message"]
    assert "512" in error["message"]


def test_truncation_is_the_clients_choice(server):
    response = server.complete("a" * 600 + "b" * 100, max_tokens=12, truncate_prompt_tokens=-1)
    assert response.json()["usage"]["prompt_tokens"] == 500
    server.complete("a" * 600 + "bcd", max_tokens=2, truncate_prompt_tokens=3)
    assert server.engine.tokenizer.decode(server.engine.requests[-1].prompt_ids) == "bcd"
    response = server.complete("aabcd", max_tokens=1, truncate_prompt_tokens=3, echo=True)
    assert response.json()["choices"][0]["text"].startswith("bcd")
    server.complete("a" * 600, truncate_prompt_tokens=-1)  # 16 tokens of answer are the default
    assert len(server.engine.requests[-1].prompt_ids) == 512 - 16
    response = server.complete("a", truncate_prompt_tokens=0)
    require_error(response, 400, param="truncate_prompt_tokens")
    response = server.chat("a" * 600, max_tokens=None, truncate_prompt_tokens=-1)
    require_error(response, 400, param="max_tokens")


def test_what_each_answer_lists_of_its_prompt_is_bounded(server, monkeypatch):
    """A small request could take gigabytes: n answers repeat it."""
    monkeypatch.setattr(exchange, "MAX_ROUTED", 500_000)
    prompts = [[100] * 500, [101] * 500]
    for field, wanted in [("prompt_logprobs", 9), ("return_routing", "all")]:
        response = server.complete(prompts, n=128, max_tokens=1, **{field: wanted})
        require_error(response, 400, param=field)
        assert server.complete(prompts, n=1, max_tokens=1, **{field: wanted}).status_code == 200


def test_unknown_models_and_paths(server):
    """A30, A40"""
    require_error(server.chat(model="gpt-9"), 404, code="model_not_found", param="model")
    response = server.client.get("/v1/models/org/name")
    require_error(response, 404, code="model_not_found", param="model")
    require_error(server.client.get("/v2/x"), 404, code="not_found")
    response = server.client.get("/v1/chat/completions")
    require_error(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"
    require_error(server.client.options("/v1/models"), 405, code="method_not_allowed")
    require_error(server.client.put("/health"), 405, code="method_not_allowed")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_bodies_that_are_no_object(server, body):
    response = server.client.post("/v1/completions", content=body,
                                  headers={"content-type": "application/json"})  # fmt: skip
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OverloadError("64 requests wait"), 429, "overloaded"),
        (CapacityError("it never fits"), 400, "request_too_large"),
        (UnavailableError("draining"), 503, 503),
        (EngineError("broken"), 500, "engine_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_the_engine(error, status, code, stream):
    """A18"""
    with run_live(lambda: FakeEngine(refusal=error)) as live:
        response = live.chat(stream=stream)
        param = "messages" if status == 400 else None
        require_error(response, status, code=code, param=param)
        assert ("retry-after" in response.headers) == (status in (429, 503))
        should_retry = "true" if status in (429, 503) else "false"
        assert response.headers["x-should-retry"] == should_retry
        live.wait_idle()


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineError("a step failed"), 500, "engine_error"),
        (CapacityError("no block is free"), 503, "out_of_memory"),
        (CheckpointError("scores are not finite"), 500, "internal_error"),
        (UnavailableError("stopped"), 503, 503),
    ],
)
def test_a_failure_ends_its_own_request_alone(error, status, code, caplog):
    """E13, K10: seen from outside; what the answer does not say is in the log."""
    with run_live(lambda: FakeEngine(failures={5: error})) as live:
        require_error(live.chat(max_tokens=9), status, code=code)
        assert ("scores are not finite" in caplog.text) == (code == "internal_error")
        assert live.chat(max_tokens=5).status_code == 200
        assert live.engine.num_ended["error"] == 1
        live.wait_idle()


def test_a_failure_within_a_stream_is_an_event():
    """A32: the error, then the end, and no [DONE]."""
    with run_live(lambda: FakeEngine(failures={5: EngineError("a step failed")})) as live:
        events, last = read_events(live.chat(max_tokens=9, stream=True))
        assert last is None
        assert events[-1]["error"] == {
            "message": "a step failed", "type": "server_error", "param": None,
            "code": "engine_error",
        }  # fmt: skip
        assert "choices" in events[-2]
        live.wait_idle()


def test_one_failing_prompt_of_several_frees_the_others():
    """Nothing of the request stays in the engine."""

    def make():
        engine = FakeEngine(seconds_per_token=0.01)
        submit = engine.submit

        def submit_two(request):
            if len(engine.requests) == 2:
                raise OverloadError("full")
            return submit(request)

        engine.submit = submit_two
        return engine

    with run_live(make) as live:
        require_error(live.complete(["a", "b", "c"], max_tokens=400), 429, code="overloaded")
        live.wait_idle(2)
        assert live.engine.num_ended["abort"] == 2


def test_what_nobody_foresaw_says_nothing_of_the_inside(caplog, monkeypatch):
    def fail():
        raise RuntimeError("secret path /root/x")

    with run_live() as live:
        monkeypatch.setattr(live.engine, "get_stats", fail)
        error = require_error(live.client.get("/metrics"), 500, code="internal_error")
        assert "secret" not in error["message"]
        assert any("secret" in str(record.exc_info) for record in caplog.records)
        assert live.chat().status_code == 200


def test_engine_failure_of_an_unknown_kind_is_a_500():
    class Weird(Exception):
        pass

    error = errors.map_error(Weird("inside"))
    assert (error.status, error.code) == (500, "internal_error")
    assert "inside" not in error.message


def test_loading_is_said(monkeypatch):
    """The body of llama-server, which clients wait on."""
    with run_live(None) as live:
        for method, path in (("GET", "/health"), ("GET", "/ping"), ("GET", "/v1/models")):
            error = require_error(live.client.request(method, path), 503, code=503)
            assert error["message"] == "Loading model"
            assert error["type"] == "unavailable_error"
        require_error(live.chat(), 503, code=503)
        assert live.client.get("/version").status_code == 200


def test_many_requests_with_one_id(server):
    """A14: the id is a label; inside each request has its own."""

    async def ask():
        async with httpx2.AsyncClient(base_url=server.url, timeout=30) as client:
            body = {"prompt": "Hello", "max_tokens": 3}
            headers = {"x-request-id": "same"}
            return await asyncio.gather(
                *(client.post("/v1/completions", json=body, headers=headers) for _ in range(50))
            )

    responses = asyncio.run(ask())
    assert [r.status_code for r in responses] == [200] * 50
    assert len({r.json()["id"] for r in responses}) == 50
    assert {r.headers["x-request-id"] for r in responses} == {"same"}


def test_a_request_id_is_cleaned(server):
    response = server.client.get("/health", headers={"x-request-id": "a b<c>" + "x" * 500})
    assert response.headers["x-request-id"] == "abc" + "x" * 122
