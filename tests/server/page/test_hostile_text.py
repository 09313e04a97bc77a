"""W01: hostile texts from the model, the user, the model's name and errors stay texts."""

import json

import pytest

from tests.server.page.conftest import wait_for_answer, wait_for_model, wait_until
from tests.server.page.payloads import PAYLOADS
from tests.server.page.scripted_server import Script, describe_model, end_stream, say, serve_script

# Whatever a page must not hold: elements that load or run, handlers, addresses that are no web's.
FIND_DANGER = """() => [...document.querySelectorAll("*")].flatMap((node) => {
  const own = new Set(["/static/theme.js", "/static/app.js"]);
  const bad = [];
  const name = node.localName;
  if (name === "script" && !own.has(new URL(node.src).pathname)) bad.push(node.outerHTML);
  if (["iframe", "object", "embed", "base", "style", "math", "video", "audio", "template"]
      .includes(name) || (name === "img" && !node.src.endsWith("/static/logo.svg"))) bad.push(name);
  for (const { name: key, value } of node.attributes) {
    if (key.startsWith("on") || key === "style" && node.closest("#transcript")) bad.push(key);
    const isAddress = ["href", "src", "action", "formaction", "xlink:href", "data"].includes(key);
    if (isAddress && !/^(https:\\/\\/|static\\/|#)/.test(value)) bad.push(value);
  }
  return bad;
}).concat(window.pwned ? ["it ran"] : [])"""


@pytest.fixture(scope="module")
def hostile():
    """Each answer is the next payload, token by token; the model's name and errors are payloads."""
    left = iter(PAYLOADS)

    def answer(body):
        text = next(left)
        is_chat = "messages" in body
        halves = [text[: len(text) // 2], text[len(text) // 2 :]]
        pieces = [{"text": t, "token_id": 1, "experts": [[0, 1]] * 2, "weights": [[0.6, 0.4]] * 2}
                  for t in halves]  # fmt: skip
        yield from (say(p["text"], is_chat=is_chat, routing=[p]) for p in pieces)
        yield from end_stream(2)

    script = Script([describe_model(PAYLOADS[6], chat_format=True)], answer)
    with serve_script(script):
        yield script


def test_there_are_sixty_of_them():
    assert len(set(PAYLOADS)) >= 60


def test_hostile_answers_and_questions_stay_text(hostile, visit):
    page = visit(hostile.url)
    wait_for_model(page)
    for number, payload in enumerate(PAYLOADS):
        page.fill("#prompt", payload)
        page.keyboard.press("Enter")
        wait_until(lambda n=number: len(hostile.bodies) == n + 1, page)
        wait_for_answer(page)
        assert page.evaluate(FIND_DANGER) == [], payload
    asked = page.locator("article.user .body").all_text_contents()
    assert asked == [body["messages"][-1]["content"] for body in hostile.bodies]
    page.reload()  # what was stored is drawn by the same hands
    wait_for_model(page)
    assert page.locator("article").count() == 2 * len(PAYLOADS)
    assert page.evaluate(FIND_DANGER) == []
    page.locator(".token").first.hover()
    assert page.evaluate(FIND_DANGER) == []
    # all that the model said is there to read, but for the one that is part of a link's address
    said = "".join(page.locator("article.assistant .body").all_text_contents())
    assert said.count("window.pwned") == json.dumps(PAYLOADS).count("window.pwned") - 1


@pytest.mark.parametrize("is_http", [True, False], ids=["refused", "in the stream"])
def test_hostile_names_titles_and_errors_stay_text(visit, is_http):
    words = PAYLOADS[6]
    error = {"message": " ".join(PAYLOADS), "code": words, "type": words}
    models = [describe_model(words), describe_model(PAYLOADS[0])]
    script = Script(models, lambda _: [{"error": error}])
    with serve_script(script):
        page = visit(script.url)
        wait_for_model(page)
        assert page.locator("#model option").first.text_content() == words
        if is_http:
            script.status, script.error = 400, error
        page.fill("#prompt", words)
        page.keyboard.press("Control+Enter")
        page.locator("#failure").wait_for()
        assert page.locator("#failure-text").text_content() == error["message"]
        assert page.locator("#conversations .title").first.text_content() == words
        assert page.evaluate(FIND_DANGER) == []


def test_stored_conversations_are_not_trusted(hostile, visit):
    page = visit(hostile.url)
    wait_for_model(page)
    item = {"title": PAYLOADS[6], "mode": PAYLOADS[0], "updated": PAYLOADS[1],
            "messages": [{"role": PAYLOADS[6], "text": text, "stats": {"tokens": PAYLOADS[6],
                          "finishReason": "__proto__", "tokensPerSecond": PAYLOADS[0]}}
                         for text in PAYLOADS]}  # fmt: skip
    page.evaluate("text => localStorage['tramontane.conversation.x'] = text", json.dumps(item))
    page.reload()
    wait_for_model(page)
    assert page.locator(".message").count() == len(PAYLOADS)
    assert page.evaluate(FIND_DANGER) == []


def test_a_link_leads_to_the_web_alone_and_tells_nothing(hostile, visit):
    page = visit(hostile.url)
    links = page.evaluate(
        """async (texts) => {
          const { Markdown } = await import("./static/markdown.js");
          return texts.flatMap((text) => {
            const root = document.createElement("div");
            new Markdown(root).update({ text });
            return [...root.querySelectorAll("a")].map(a => [a.protocol, a.rel, a.target]);
          });
        }""",
        [*PAYLOADS, "[a](http://example.com/b?c#d) [b](https://example.com)"],
    )
    assert {protocol for protocol, _, _ in links} == {"http:", "https:"}
    assert {(rel, target) for _, rel, target in links} == {
        ("noopener noreferrer nofollow", "_blank")
    }
