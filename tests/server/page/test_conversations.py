"""Write, stream, stop, take back, edit, keep, export: the page over the real server and an engine
that answers with letters.
"""

import json
from pathlib import Path

import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.live import LiveServer, run_live
from tests.server.page.conftest import wait_for_answer, wait_for_model, wait_until
from tramontane.tokenizer.mistral_format import MistralFormat

KEY = "sk-a-key-of-this-test"


@pytest.fixture(scope="module")
def base():
    """A base model; 16 tokens an answer."""
    with run_live(lambda: FakeEngine(generation_overrides={"max_tokens": 16})) as live:
        yield live


@pytest.fixture(scope="module")
def chat():
    """A model with a chat format."""
    with run_live(lambda: FakeEngine(chat_format=MistralFormat())) as live:
        yield live


@pytest.fixture
def story(base, visit):
    """A story with one answer: page, and the answer."""
    page = visit(base.url)
    wait_for_model(page)
    write(page, "Once")
    return page


def write(page, text: str, keys: str = "Control+Enter") -> None:
    page.fill("#prompt", text)
    page.keyboard.press(keys)
    page.locator(".message.assistant").last.wait_for(state="attached")
    wait_for_answer(page)


def read_story(page) -> list[tuple[str, str]]:
    """[("user", text), ("assistant", text), ...]"""
    read = "all => all.map(s => [s.classList[1], s.textContent])"
    return [tuple(part) for part in page.locator(".story .message").evaluate_all(read)]


def list_titles(page) -> list[str]:
    return page.locator("#conversations .title").all_text_contents()


def get_last_body(live: LiveServer):
    return live.engine.requests[-1]


def test_a_base_model_continues_what_the_user_writes(base, story):
    (_, answer) = read_story(story)[1]
    assert len(answer) == 16
    write(story, "Then")  # words that would run into the last ones are spaced out
    parts = read_story(story)
    assert [role for role, _ in parts] == ["user", "assistant", "user", "assistant"]
    assert parts[2][1] in (" Then", "Then")
    prompt = base.engine.tokenizer.decode(list(get_last_body(base).prompt_ids))
    assert prompt == "".join(text for _, text in parts[:3])
    story.click("#send")  # nothing written: the model goes on by itself
    wait_until(lambda: len(read_story(story)) == 5, story)


def test_stop_ends_the_answer_in_the_engine(visit):
    """W10"""
    with run_live(lambda: FakeEngine(seconds_per_token=0.03)) as live:
        page = visit(live.url)
        wait_for_model(page)
        for stop in (lambda: page.click("#send"), lambda: page.keyboard.press("Escape")):
            num_before = live.engine.num_ended["abort"]
            page.fill("#prompt", "Once")
            page.keyboard.press("Control+Enter")
            wait_until(lambda: page.locator(".token").count() > 4, page)
            assert page.locator("#send").inner_text() == "Stop"
            stop()
            wait_for_answer(page)
            wait_until(lambda n=num_before: live.engine.num_ended["abort"] == n + 1, page)
            assert "stopped" in page.locator("#stats").inner_text()
            assert page.locator("#failure").is_hidden()
            page.click("#new")
        live.wait_idle()


def test_an_answer_can_be_taken_back_and_written_again(base, story):
    first = read_story(story)
    story.click("#again")
    wait_until(lambda: len(base.engine.requests) > 1 and len(read_story(story)) == 2, story)
    wait_for_answer(story)
    assert read_story(story)[0] == first[0]
    story.click("#undo")
    assert read_story(story) == []
    assert story.input_value("#prompt") == "Once"
    assert list_titles(story) == []


def test_an_edit_keeps_the_experts_of_what_it_left_alone(story):
    write(story, "And")
    parts = read_story(story)
    text = "".join(part for _, part in parts)
    story.click("#edit")
    editor = story.locator("#editor")
    assert editor.input_value() == text
    editor.fill(text[:-3] + "!")
    story.keyboard.press("Escape")
    assert read_story(story) == [*parts[:3], ("user", parts[3][1][:-3] + "!")]
    assert story.locator(".story .message").nth(1).locator(".token").count() == len(
        parts[1][1].replace(" ", "")
    ) + parts[1][1].count(" ")


def test_only_changed_settings_are_sent(base, story):
    before = get_last_body(base).params
    assert before.temperature == base.engine.default_params.temperature or before.temperature == 1.0
    slider = story.locator("#top_p")
    slider.focus()
    story.keyboard.press("ArrowLeft")
    story.fill("#seed", "7")
    story.locator("#seed").blur()
    bodies = []
    story.on("request", lambda r: r.method == "POST" and bodies.append(json.loads(r.post_data)))
    story.click("#send")
    wait_until(lambda: len(bodies) == 1, story)
    wait_for_answer(story)
    own = {"model", "stream", "stream_options", "prompt", "return_routing", "max_tokens"}
    assert set(bodies[0]) - own == {"top_p", "seed"}
    assert bodies[0]["seed"] == 7
    story.click("#reset")
    story.click("#again")
    wait_until(lambda: len(bodies) == 2, story)
    assert set(bodies[1]) - own == set()
    wait_for_answer(story)


def test_conversations_are_kept_deleted_and_brought_back(story):
    story.click("#new")
    write(story, "The wind")
    story.reload()
    wait_for_model(story)
    assert list_titles(story) == ["The wind", "Once"]
    assert read_story(story)[0] == ("user", "The wind")
    story.locator("#conversations li").nth(1).hover()
    story.locator("#conversations li").nth(1).locator("[aria-label=Delete]").click()
    assert list_titles(story) == ["The wind"]
    story.locator(".toast button").click()
    assert list_titles(story) == ["The wind", "Once"]
    assert read_story(story)[0] == ("user", "Once")
    story.click("#remove-all")
    story.reload()
    wait_for_model(story)
    assert list_titles(story) == []


def test_a_conversation_is_exported_as_json(story):
    parts = read_story(story)
    with story.expect_download() as download:
        story.click("#export-all")
    content = json.loads(Path(download.value.path()).read_text())
    (conversation,) = content["conversations"]
    assert [(m["role"], m["text"]) for m in conversation["messages"]] == parts
    assert conversation["title"] == "Once"
    assert download.value.suggested_filename.endswith(".json")


def test_what_does_not_fit_makes_the_oldest_go(base, visit):
    page = visit(base.url)
    wait_for_model(page)
    page.evaluate(
        """() => { for (let i = 0; i < 4; i++) localStorage.setItem(`tramontane.conversation.${i}`,
        JSON.stringify({ title: `old ${i}`, mode: "story", updated: i,
                         messages: [{ role: "user", text: "x".repeat(900000) }] })) }"""
    )
    page.reload()
    wait_for_model(page)
    assert list_titles(page) == ["old 3", "old 2", "old 1", "old 0"]
    page.click("#new")
    write(page, "Once")
    assert list_titles(page) == ["Once", "old 3", "old 2", "old 1"]
    assert "space is full" in page.locator(".toast").inner_text()
    page.reload()
    wait_for_model(page)
    assert list_titles(page) == ["Once", "old 3", "old 2", "old 1"]


def test_storage_that_is_not_ours_is_passed_over(base, visit):
    page = visit(base.url)
    wait_for_model(page)
    broken = ["", "{", "null", "[]", '{"messages": 3}', '{"messages": [null]}',
              '{"messages": [{"role": "user", "text": "x", "trace": {}}]}']  # fmt: skip
    stored = {f"conversation.{i}": text for i, text in enumerate(broken)}
    stored |= {"sampling": "null", "glass": "7"}
    page.evaluate(
        "all => { for (const k in all) localStorage[`tramontane.${k}`] = all[k] }", stored
    )
    page.reload()
    wait_for_model(page)
    write(page, "Once")
    assert list_titles(page)[0] == "Once"


def test_a_chat_model_is_talked_to(chat, visit):
    page = visit(chat.url)
    wait_for_model(page)
    assert page.locator("#edit").is_hidden()
    write(page, "Hello", keys="Enter")
    write(page, "two\nlines", keys="Enter")
    roles = page.locator("article.message").evaluate_all("all => all.map(a => a.classList[1])")
    assert roles == ["user", "assistant", "user", "assistant"]
    asked = chat.engine.tokenizer.decode(list(get_last_body(chat).prompt_ids))
    assert "Hello" in asked
    assert "two\nlines" in asked
    page.locator("#modes label", has_text="Continue a text").click()
    write(page, "Once")
    assert page.locator(".story").count() == 1


def test_the_key_is_asked_for_and_kept_for_the_tab_alone(visit):
    """W10"""
    with run_live(FakeEngine, api_keys=(KEY,)) as live:
        page = visit(live.url)
        page.locator("#key-dialog").wait_for()
        page.fill("#key-input", "wrong")
        page.keyboard.press("Enter")
        wait_until(lambda: "not known" in page.locator("#failure-text").inner_text(), page)
        page.fill("#key-input", "schl\u00fcssel \u2603")
        page.keyboard.press("Enter")
        wait_until(lambda: "ASCII" in page.locator("#failure-text").inner_text(), page)
        page.fill("#key-input", KEY)
        addresses = []
        page.on("request", lambda request: addresses.append(request.url))
        page.keyboard.press("Enter")
        wait_for_model(page)
        write(page, "Once")
        assert addresses
        assert not any(KEY in address for address in [*addresses, page.url])
        assert page.evaluate("sessionStorage.getItem('tramontane.key')") == KEY
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")
        assert KEY not in page.content()


def test_the_page_waits_for_a_model_that_loads(visit):
    with run_live(None) as live:
        page = visit(live.url)
        wait_until(lambda: "Trying again" in page.locator("#failure-text").inner_text(), page)
        live.call(live.state.attach, live.call(FakeEngine))
        wait_for_model(page)
        assert page.locator("#failure").is_hidden()
