"""The safety prefix: who gets it, and how a client sees that it was there."""

from hashlib import sha256

import numpy as np
import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.live import run_live
from tests.server.sse import read_events
from tramontane.server.safety import SAFE_PROMPT
from tramontane.tokenizer.mistral_format import MistralFormat


@pytest.fixture(scope="module")
def by_policy():
    def make():
        return FakeEngine(chat_format=MistralFormat(1))

    with (
        run_live(make, safe_prompt="off") as off,
        run_live(make, safe_prompt="request") as request,
        run_live(make, safe_prompt="always") as always,
    ):
        yield {"off": off, "request": request, "always": always}


def read_prompt(live) -> list[int]:
    return list(live.engine.requests[-1].prompt_ids)


@pytest.mark.parametrize("fields", [{"safe_prompt": True}, {"safe_mode": True},
                                    {"safe_mode": True, "safe_prompt": True}])  # fmt: skip
def test_both_names_put_the_same_words_first(by_policy, fields):
    """S-08"""
    live = by_policy["request"]
    response = live.chat("Hello", **fields)
    text = f"[INST] {SAFE_PROMPT}\n\nHello [/INST]"
    assert read_prompt(live) == [1, *live.engine.tokenizer.encode(text)]
    assert response.headers["x-tramontane-safe-prompt"] == "mistral; policy=request"
    safety = response.json()["safety"]
    assert (safety["policy"], safety["prefix"]) == ("request", SAFE_PROMPT)
    digest = sha256(np.array(read_prompt(live), "<i4").tobytes()).hexdigest()
    assert safety["prompt_sha256"] == [digest]


def test_without_asking_there_is_none(by_policy):
    for policy in ("off", "request"):
        response = by_policy[policy].chat("Hello")
        assert response.json()["safety"]["prefix"] is None
        assert response.headers["x-tramontane-safe-prompt"] == f"none; policy={policy}"
        assert SAFE_PROMPT not in by_policy[policy].engine.tokenizer.decode(
            read_prompt(by_policy[policy])
        )


@pytest.mark.parametrize("field", ["safe_prompt", "safe_mode"])
def test_off_refuses_who_asks(by_policy, field):
    """An answer without the prefix would be taken for one with it."""
    response = by_policy["off"].chat("Hello", **{field: True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("fields", [{}, {"safe_prompt": False}, {"safe_mode": False},
                                    {"safe_prompt": None}, {"stream": True}])  # fmt: skip
def test_always_cannot_be_switched_off(by_policy, fields):
    live = by_policy["always"]
    response = live.chat("Hello", **fields)
    assert live.engine.tokenizer.decode(read_prompt(live)).startswith(f"[INST] {SAFE_PROMPT}")
    assert response.headers["x-tramontane-safe-prompt"] == "mistral; policy=always"
    if "stream" in fields:
        events, _ = read_events(response)
        assert events[0]["safety"]["prefix"] == SAFE_PROMPT


@pytest.mark.parametrize("prompt", ["x" * 100, [1, *[123] * 100]])
def test_a_cut_prompt_keeps_the_prefix(by_policy, prompt):
    """The beginning is cut off behind it; what leaves no room for it is refused."""
    live = by_policy["always"]
    size = len(SAFE_PROMPT) + 2
    response = live.complete(prompt, truncate_prompt_tokens=1 + size + 5, max_tokens=1, echo=True)
    read = read_prompt(live)
    assert (read[0], len(read)) == (1, 1 + size + 5)
    assert live.engine.tokenizer.decode(read) == f"{SAFE_PROMPT}\n\nxxxxx"
    assert response.json()["choices"][0]["text"].startswith(f"{SAFE_PROMPT}\n\nxxxxx")
    refused = live.complete(prompt, truncate_prompt_tokens=1 + size)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "truncate_prompt_tokens"


def test_a_cut_conversation_would_lose_the_prefix(by_policy):
    refused = by_policy["always"].chat("Hello", truncate_prompt_tokens=20)
    assert refused.status_code == 400
    assert "safety prefix" in refused.json()["error"]["message"]
    assert by_policy["always"].chat("Hello", truncate_prompt_tokens=500).status_code == 200


def test_always_holds_on_every_route(by_policy):
    """Raw text and raw ids do not lead around it; an echo shows what was read."""
    live = by_policy["always"]
    response = live.complete("[INST] x [/INST]", echo=True, max_tokens=1)
    assert live.engine.tokenizer.decode(read_prompt(live)) == f"{SAFE_PROMPT}\n\n[INST] x [/INST]"
    assert response.json()["choices"][0]["text"].startswith(SAFE_PROMPT)
    live.complete([1, 100, 101], max_tokens=1)
    assert live.engine.tokenizer.decode(read_prompt(live)) == f"{SAFE_PROMPT}\n\nab"
    assert read_prompt(live).count(1) == 1
    live.complete([100], max_tokens=1)
    assert live.engine.tokenizer.decode(read_prompt(live)) == f"{SAFE_PROMPT}\n\na"
    shown = live.post("/tokenize", messages=[{"role": "user", "content": "Hello"}]).json()
    live.chat("Hello")
    assert shown["tokens"] == read_prompt(live)


def test_the_prefix_comes_before_the_conversations_own_system_text(by_policy):
    live = by_policy["request"]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    live.chat(messages=messages, safe_prompt=True)
    text = live.engine.tokenizer.decode(read_prompt(live))
    assert text == f"[INST] {SAFE_PROMPT}\n\nBe brief.\n\nHi [/INST]"
