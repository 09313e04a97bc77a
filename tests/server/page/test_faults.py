"""What the page does when an answer fails, in a conversation of any length."""

import json
import threading

import pytest

from tests.server.page.conftest import wait_for_answer, wait_for_model, wait_until
from tests.server.page.scripted_server import Script, describe_model, end_stream, say, serve_script

DENSE = {"num_experts": None, "num_experts_per_tok": None}


def ask(page, text: str = "Once") -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Control+Enter")
    page.locator(".message").first.wait_for(state="attached")
    wait_for_answer(page)


def read_answers(page) -> list[str]:
    return page.locator(".message.assistant").all_text_contents()


def cut_off():
    yield say(" the wind", is_chat=False)


def fail_late():
    yield say(" the wind", is_chat=False)
    yield {"error": {"message": "the engine has stopped", "type": "server_error", "code": 500}}


def ping_and_split():
    """A stream as the standard allows it: comments, other fields, CR LF, data over two lines."""
    yield ": still working\n\n"
    yield 'event: x\r\nid: 1\r\ndata: {"choices":\r\ndata: [{"text": " caf\u00e9"}]}\r\n\r\n'
    yield "retry: 1\n\n"
    yield 'data:{"choices":[{"text":" \U0001f43a"}]}\n\n'
    yield from end_stream(2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [(cut_off, "ended before its end"), (fail_late, "the engine has stopped")],
    ids=["cut off", "an error event"],
)
def test_what_came_before_a_failure_is_kept(visit, answer, message):
    answers = [answer, lambda: [say(" and went.", is_chat=False), *end_stream(3)]]
    script = Script([describe_model("m", **DENSE)], lambda _: answers.pop(0)())
    with serve_script(script):
        page = visit(script.url)
        wait_for_model(page)
        ask(page)
        assert read_answers(page) == [" the wind"]
        assert message in page.locator("#failure-text").text_content()
        page.locator("#failure button", has_text="Try again").click()
        wait_until(lambda: len(script.bodies) == 2, page)
        wait_for_answer(page)
        assert script.bodies[1]["prompt"] == "Once the wind"  # it goes on from what is there
        assert page.locator("#failure").is_hidden()


def test_a_conversation_is_answered_anew(visit):
    """An answer that broke off is not gone on with; without new words nothing is sent."""
    answers = [
        lambda: [say("Half", is_chat=True)],
        lambda: [say("Whole.", is_chat=True), *end_stream(3)],
    ]
    model = describe_model("m", chat_format=True, **DENSE)
    with serve_script(Script([model], lambda _: answers.pop(0)())) as script:
        page = visit(script.url)
        wait_for_model(page)
        ask(page, "Hello")
        assert read_answers(page) == ["AnswerHalf"]
        page.locator("#failure button", has_text="Try again").click()
        wait_until(lambda: len(script.bodies) == 2, page)
        wait_for_answer(page)
        assert script.bodies[1]["messages"] == [{"role": "user", "content": "Hello"}]
        assert read_answers(page) == ["AnswerWhole."]
        assert page.locator("#send").is_disabled()
        page.focus("#prompt")
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(100)
        assert (len(script.bodies), page.locator("#failure").is_hidden()) == (2, True)


def test_a_model_that_says_nothing_leaves_nothing(visit):
    piece = {"text": "", "token_id": 2, "experts": None, "weights": None}
    answer = [say("", is_chat=False, routing=[piece]), *end_stream(1)]
    with serve_script(Script([describe_model("m")], lambda _: answer)) as script:
        page = visit(script.url)
        wait_for_model(page)
        ask(page)
        assert read_answers(page) == []
        assert "nothing to add" in page.locator(".toast").text_content()


def test_a_server_that_is_gone_is_named(visit):
    with serve_script(Script([describe_model("m")], lambda _: end_stream(0))) as script:
        page = visit(script.url)
        wait_for_model(page)
    ask(page)
    assert "does not answer" in page.locator("#failure-text").text_content()
    assert read_answers(page) == []


def test_an_answer_that_is_no_api_is_shown(visit):
    script = Script([describe_model("m")], lambda _: [], status=502)
    with serve_script(script):
        page = visit(script.url)
        page.locator("#failure").wait_for()
        assert "502" in page.locator("#failure-text").text_content()
        script.status = 200
        page.locator("#failure button", has_text="Try again").click()
        wait_for_model(page)


def test_the_stream_is_read_as_the_standard_says(visit):
    with serve_script(Script([describe_model("m", **DENSE)], lambda _: ping_and_split())) as script:
        page = visit(script.url)
        wait_for_model(page)
        ask(page)
        assert read_answers(page) == [" caf\u00e9 \U0001f43a"]
        assert page.locator("#failure").is_hidden()


def test_a_dense_model_has_no_glass_box(visit):
    answer = [say(" x", is_chat=False), *end_stream(1)]
    script = Script([describe_model("m", **DENSE)], lambda _: answer)
    with serve_script(script):
        page = visit(script.url)
        wait_for_model(page)
        assert page.locator("#glass").is_hidden()
        ask(page)
        assert "return_routing" not in script.bodies[0]
        assert "experts" not in page.locator("#stats").text_content()


def test_a_model_of_other_sizes_reads_old_conversations(visit):
    """Layers and experts of the answers that are stored are not those of the model now."""

    def answer(body):
        n_layers = script.models[0]["tramontane"]["n_layers"]
        experts, weights = [[0, 1]] * n_layers, [[0.5, 0.5]] * n_layers
        piece = {"text": " x", "token_id": 1, "experts": experts, "weights": weights}
        return [say(" x", is_chat=False, routing=[piece]), *end_stream(1)]

    script = Script([describe_model("small")], answer)
    with serve_script(script):
        page = visit(script.url)
        wait_for_model(page)
        ask(page)
        for layers, experts in ((32, 8), (1, 64)):
            script.models = [describe_model("other", n_layers=layers, num_experts=experts)]
            page.reload()
            wait_for_model(page)
            page.locator(".token").first.hover()
            ask(page, "And")
            assert page.locator("#heat tbody tr").count() == layers


def test_five_hundred_messages_stay_as_they_are_while_one_more_comes(visit):
    """W10: an answer that streams touches nothing but itself."""
    go_on = threading.Event()

    def answer(body):
        for i in range(40):
            yield say(f"**word** {i} ", is_chat=True)
            if i == 20:
                go_on.wait(10)
        yield from end_stream(40)

    script = Script([describe_model("m", chat_format=True, **DENSE)], answer)
    with serve_script(script):
        page = visit(script.url)
        wait_for_model(page)
        messages = [{"role": ("user", "assistant")[i % 2], "text": f"Words **{i}** and more. " * 20}
                    for i in range(500)]  # fmt: skip
        item = {"title": "long", "mode": "chat", "updated": 1, "messages": messages}
        page.evaluate("text => localStorage['tramontane.conversation.1'] = text", json.dumps(item))
        page.reload()
        wait_for_model(page)
        assert page.locator("article").count() == 500
        page.fill("#prompt", "one more")
        page.keyboard.press("Enter")
        page.locator("article").nth(501).locator("strong").nth(9).wait_for()
        page.evaluate(
            """() => {
              window.touched = new Set();
              const find = (node) => node.closest?.("article")?.dataset.entry ?? node.nodeName;
              new MutationObserver((all) => all.forEach(({ target }) => touched.add(find(target))))
                .observe(document.getElementById("transcript"), { subtree: true, childList: true });
            }"""
        )
        go_on.set()
        wait_for_answer(page)
        assert page.evaluate("[...touched]") == ["501"]
        assert len(script.bodies[0]["messages"]) == 501
        assert page.evaluate(
            "() => { const s = document.getElementById('scroller');"
            "return s.scrollHeight - s.scrollTop - s.clientHeight < 80 }"
        )
