"""Completions, embeddings, the vocabulary, the page, and what dashboards ask."""

import base64

import numpy as np
import pytest

from tests.server.fake_engine import FakeEngine, make_embedding
from tests.server.live import run_live
from tests.server.sse import read_events
from tramontane.server.page import load_page


def test_prompts_of_every_kind(server):
    """Text, texts, ids, lists of ids; the answers keep their order."""
    texts = server.complete(["Hi", "You"], max_tokens=4, n=2, seed=1).json()["choices"]
    ids = [[1, *(3 + byte for byte in text.encode())] for text in ("Hi", "You")]
    assert [choice["index"] for choice in texts] == [0, 1, 2, 3]
    by_ids = server.complete(ids, max_tokens=4, n=2, seed=1).json()["choices"]
    assert [c["text"] for c in by_ids] == [c["text"] for c in texts]
    alone = server.complete("You", max_tokens=4, n=2, seed=1).json()["choices"]
    assert [c["text"] for c in alone] == [c["text"] for c in texts[2:]]
    assert (
        server.complete(ids[0], max_tokens=4, seed=1).json()["choices"][0]["text"]
        == (texts[0]["text"])
    )


def test_defaults_are_openais(server):
    assert server.complete("x").json()["usage"]["completion_tokens"] == 16


def test_a_stream_of_several_prompts(server):
    whole = server.complete(["a", "b"], max_tokens=6, n=2, echo=True).json()["choices"]
    events, last = read_events(
        server.complete(["a", "b"], max_tokens=6, n=2, echo=True, stream=True)
    )
    assert last == "[DONE]"
    for choice in whole:
        chunks = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
        assert [c["finish_reason"] for c in chunks if c["finish_reason"]] == ["length"]


def test_echo_with_logprobs_is_what_evaluations_read(server):
    """lm-eval's request: ids, echo, logprobs 1, max_tokens 1."""
    (choice,) = server.complete(
        [1, 100, 101, 102], echo=True, logprobs=1, max_tokens=1, temperature=0
    ).json()["choices"]  # fmt: skip
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:4] == ["<s>", "a", "b", "c"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"a": -0.5}
    assert logprobs["text_offset"] == [0, 0, 1, 2, 3]
    assert "prompt_logprobs" not in choice
    assert {len(values) for values in logprobs.values()} == {5}
    nothing = server.complete([1, 100], echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert nothing["text"] == "a"
    assert len(nothing["logprobs"]["tokens"]) == 2


def test_streamed_logprobs_are_the_same(server):
    whole = server.complete("x", logprobs=2, max_tokens=5).json()["choices"][0]["logprobs"]
    events, _ = read_events(server.complete("x", logprobs=2, max_tokens=5, stream=True))
    parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    for name, values in whole.items():
        assert [value for part in parts for value in part[name]] == values


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": ["a", 1]}, "prompt.1"),
        ({"prompt": [9999]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 100, "n": 3}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"echo": True, "stream": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_bad_completions_are_named(server, fields, param):
    response = server.complete(**{"prompt": "x", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_bos_is_the_clients_choice(server):
    server.complete("x", add_special_tokens=False)
    assert list(server.engine.requests[-1].prompt_ids) == [3 + ord("x")]


def test_filling_in_is_refused(server):
    response = server.post("/v1/fim/completions", prompt="a", suffix="b")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_model"


def test_embeddings_in_both_forms(server):
    expected = make_embedding([1, 3 + ord("a")])
    body = server.post("/v1/embeddings", input="a").json()
    assert body["data"][0]["embedding"] == expected.tolist()
    assert body["id"]
    body = server.post("/v1/embeddings", input=["a", "a"], encoding_format="base64").json()
    for item in body["data"]:
        decoded = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
        assert (decoded == expected).all()
    request = server.engine.requests[-1]
    assert request.wants_embedding
    assert request.params.max_tokens == 0


@pytest.mark.parametrize("field", ["dimensions", "output_dimension"])
def test_embeddings_can_be_shortened(server, field):
    vector = server.post("/v1/embeddings", input="a", **{field: 4}).json()["data"][0]["embedding"]
    expected = make_embedding([1, 3 + ord("a")])[:4]
    assert vector == pytest.approx(expected / np.linalg.norm(expected), abs=1e-6)
    response = server.post("/v1/embeddings", input="a", **{field: 17})
    assert response.json()["error"]["param"] == field


def test_embeddings_that_do_not_fit(server):
    error = server.post("/v1/embeddings", input="x" * 600).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")


def test_the_vocabulary(server):
    body = server.post("/tokenize", prompt="h\u00e9", return_token_strs=True).json()
    assert body["tokens"] == [1, 107, 198, 172]
    assert body["token_strs"] == ["<s>", "h", "bytes:\\xc3", "bytes:\\xa9"]
    assert (body["count"], body["max_model_len"]) == (4, 512)
    assert server.post("/detokenize", tokens=body["tokens"]).json() == {"prompt": "h\u00e9"}
    assert server.post("/detokenize", tokens=[]).json() == {"prompt": ""}
    without = server.post("/tokenize", prompt="h", add_special_tokens=False).json()
    assert without["tokens"] == [107]
    alone = server.post("/tokenize", prompt="</s>", add_special_tokens=False).json()
    assert alone["tokens"] == [2]  # how lm-eval finds it; within a text it is text:
    assert (
        2 not in server.post("/tokenize", prompt="</s> ", add_special_tokens=False).json()["tokens"]
    )
    assert server.post("/tokenize", prompt="</s>").json()["count"] == 5
    chat = server.post("/tokenize", messages=[{"role": "user", "content": "h"}]).json()
    assert chat["tokens"] == [1, 107]
    assert server.post("/tokenize").status_code == 400
    assert server.post("/detokenize", tokens=[9999]).json()["error"]["param"] == "tokens"
    info = server.client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")


def test_the_vocabulary_ignores_nothing_in_silence(server):
    messages = [{"role": "user", "content": "h"}]
    response = server.post("/tokenize", messages=messages, tools=[{"type": "function"}])
    assert response.json()["error"]["param"] == "tools"
    response = server.post("/tokenize", messages=messages, add_special_tokens=True)
    assert response.json()["error"]["param"] == "add_special_tokens"
    response = server.post("/tokenize", prompt="h", wish=1)
    assert response.headers["x-tramontane-ignored-fields"] == "wish"
    response = server.post("/detokenize", tokens=[107], wish=1)
    assert response.headers["x-tramontane-ignored-fields"] == "wish"


def test_models_go_by_their_names():
    names = ("org/big-model", "small")
    with run_live(served_model_names=names) as live:
        (card,) = live.client.get("/v1/models").json()["data"]
        assert (card["id"], card["aliases"], card["root"]) == ("org/big-model", ["small"], "fake")
        assert live.client.get("/v1/models/org/big-model").json() == card
        assert live.chat(model="small").json()["model"] == "org/big-model"
        assert live.chat(model="fake").status_code == 404
        assert card["tramontane"]["num_experts"] == 4


def test_what_dashboards_ask(server):
    assert server.client.get("/ping").json() == {"status": "ok"}
    assert server.client.head("/health").status_code == 200
    assert server.client.get("/load").json() == {"server_load": 0}
    assert server.client.get("/version").json()["version"]


def test_the_page_and_its_files(tmp_path, monkeypatch):
    """W01: nothing but the server's own scripts may run in the page."""
    (tmp_path / "index.html").write_text("<!doctype html><script src=static/app.js></script>")
    (tmp_path / "app.js").write_text("let x")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "folder").mkdir()
    files = load_page(tmp_path)
    assert set(files) == {"/", "/static/index.html", "/static/app.js"}
    monkeypatch.setattr("tramontane.server.app.load_page", lambda: files)
    with run_live(FakeEngine, api_keys=("key-0123456789abcdef",)) as live:
        live.client.headers.pop("authorization")
        for path, kind in (("/", "text/html"), ("/static/app.js", "text/javascript")):
            response = live.client.get(path)
            assert response.status_code == 200
            assert response.headers["content-type"].startswith(kind)
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self'" in policy
            assert "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
            known = {"if-none-match": response.headers["etag"]}
            again = live.client.get(path, headers=known)
            assert (again.status_code, again.content) == (304, b"")
        for path in ("/static/.hidden", "/static/folder", "/static/nothing.js"):
            assert live.client.get(path).status_code == 401


def test_a_copy_without_a_page_says_so(monkeypatch):
    monkeypatch.setattr("tramontane.server.app.load_page", dict)
    with run_live() as live:
        response = live.client.get("/")
        assert response.status_code == 404
        assert "index.html" in response.json()["error"]["message"]
