"""The glass box over the real server and the bundled model; what it shows against the engine's own
routing of the same prompt.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.server.live import LiveServer, run_live
from tests.server.page.conftest import wait_for_answer, wait_for_model, wait_until
from tramontane.engine.async_engine import AsyncEngine
from tramontane.engine.completion import TextPiece
from tramontane.engine.llm import LLM

PROMPT = "Once upon a time there was a little fox who"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def bundled() -> Iterator[LiveServer]:
    """The real server over the real engine and the bundled model."""
    engine = AsyncEngine(LLM(), name="tramontane-23m")

    def start() -> AsyncEngine:
        engine.start()
        return engine

    with run_live(start) as live:
        yield live
    engine.stop()


@pytest.fixture(scope="module")
def pieces() -> list[TextPiece]:
    """The same answer from Python."""
    llm = LLM()
    params = replace(llm.default_params, max_tokens=NUM_TOKENS, temperature=0.0)
    stream = llm.stream(PROMPT, params, collect_routing=True)
    return list(stream.iterate(with_experts=True))


@pytest.fixture(scope="module")
def answered(bundled, browser):
    """What the browser stores after the page has asked for the greedy answer to PROMPT."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(bundled.url)
    wait_for_model(page)
    set_control(page, "temperature", 0)
    set_control(page, "max_tokens", NUM_TOKENS)
    page.fill("#prompt", PROMPT)
    page.keyboard.press("Control+Enter")
    page.locator(".token").first.wait_for()  # it may have ended before one can look
    wait_for_answer(page)
    yield context.storage_state()
    context.close()


@pytest.fixture
def page(bundled, answered, visit):
    """The page opened again after that answer: text, experts, statistics and settings are kept."""
    page = visit(bundled.url, storage_state=answered)
    wait_for_model(page)
    return page


def set_control(page, name: str, value: float) -> None:
    page.locator(f"#{name}").evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')) }", value
    )


def read_tokens(page) -> list[tuple[int, str, int]]:
    """(number, text, expert that colours it or -1) of each token on the page."""
    read = """spans => spans.map(s => [Number(s.dataset.token), s.textContent,
        s.dataset.expert === "" ? -1 : Number(s.dataset.expert)])"""
    return [tuple(token) for token in page.locator(".token").evaluate_all(read)]


def test_the_answer_reads_as_in_python(page, pieces):
    answer = "".join(piece.text for piece in pieces)
    assert page.locator(".story").inner_text() == PROMPT + answer
    shown = {number: text for number, text, _ in read_tokens(page)}
    assert shown == {i: p.text.lstrip() or p.text for i, p in enumerate(pieces) if p.text}
    stats = page.locator("#stats").inner_text()
    assert f"{NUM_TOKENS} tokens, cut" in stats
    assert "tokens/s" in stats
    assert "2 experts" in stats
    assert "cached" in stats


@pytest.mark.parametrize("layer", [0, 3, 5])
def test_tokens_have_the_colour_of_their_first_expert(page, pieces, layer):
    page.locator(f"#heat tr[data-layer='{layer}'] th").click()
    for number, _, expert in read_tokens(page):
        experts = pieces[number].selected_experts
        assert expert == (-1 if experts is None else experts[layer, 0])
        colour = page.locator(f".token[data-token='{number}']").first.get_attribute("class")
        assert f"x{expert}" in colour.split() or expert == -1
    assert f"layer {layer}" in page.locator("#glass-note").inner_text()


def test_the_card_shows_all_layers_experts_and_weights(page, pieces):
    page.locator(".token[data-token='5']").hover()
    card = page.locator("#card")
    assert f"id {pieces[5].token_id} " in card.locator("header").inner_text()
    rows = card.locator("tr").all()
    assert len(rows) == len(pieces[5].selected_experts)
    for layer, row in enumerate(rows):
        assert row.locator("th").inner_text() == str(layer)
        shown = [int(text) for text in row.locator(".bar").all_inner_texts()]
        assert shown == pieces[5].selected_experts[layer].tolist()
        weights = [float(text) for text in row.locator(".weights").inner_text().split()]
        # stored to 1/255, shown to 1/100
        np.testing.assert_allclose(weights, pieces[5].expert_weights[layer], atol=0.008)
    page.mouse.move(5, 5)
    assert card.is_hidden()


def test_the_last_token_has_no_experts(page, pieces):
    page.locator(".token").last.hover()
    assert "no expert ran it" in page.locator("#card").inner_text()
    assert page.locator("#card tr").count() == 0


def test_the_heat_map_counts_every_choice(page, pieces):
    experts = np.stack([p.selected_experts for p in pieces if p.selected_experts is not None])
    for layer in range(experts.shape[1]):
        counts = np.bincount(experts[:, layer].ravel(), minlength=8)
        cells = page.locator(f"#heat tr[data-layer='{layer}'] td").all_inner_texts()
        expected = np.floor(100 * counts / counts.sum() + 0.5).astype(int)
        assert cells == [str(e) if c else "" for e, c in zip(expected, counts, strict=True)]


def test_a_cell_lights_the_tokens_that_used_it(page, pieces):
    expert = pieces[0].selected_experts[1, 1]
    page.locator(f"#heat tr[data-layer='1'] td[data-expert='{expert}']").hover()
    lit = page.locator(".token.lit").evaluate_all("all => all.map(t => Number(t.dataset.token))")
    used = [i for i, p in enumerate(pieces[:-1]) if expert in p.selected_experts[1]]
    assert lit == [i for i in used if pieces[i].text]
    note = page.locator("#cell-note").inner_text()
    assert f"layer 1, expert {expert}: {len(used)} tokens" in note
    page.mouse.move(5, 5)
    assert page.locator(".token.lit").count() == 0


def test_the_map_and_the_tokens_are_read_by_keyboard(page):
    page.locator("#heat").focus()
    page.keyboard.press("ArrowUp")
    assert page.locator("#heat tr.chosen").get_attribute("data-layer") == "2"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#heat td.lit").get_attribute("data-expert") == "1"
    assert "layer 2, expert 1" in page.locator("#announcer").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#heat td.lit").count() == 0
    last = page.locator(".token[tabindex='0']")
    assert last.count() == 1
    last.focus()
    page.keyboard.press("ArrowLeft")
    assert f"token {NUM_TOKENS - 1}" in page.locator("#card").inner_text()
    page.keyboard.press("Escape")
    assert page.locator("#card").is_hidden()


def test_colours_and_numbers_can_be_switched(page):
    colour = "token => getComputedStyle(token).backgroundColor"
    number = "token => getComputedStyle(token, '::after').content"
    token = page.locator(".token").first
    assert token.evaluate(number) == "none"
    page.locator("label:has(#number-tokens)").click()
    assert token.evaluate(number) not in ("none", '""')
    page.locator("label:has(#color-tokens)").click()
    assert token.evaluate(colour) == "rgba(0, 0, 0, 0)"
    token.hover()
    assert page.locator("#card").is_hidden()


def test_the_dial_sets_the_experts_of_each_token(page):
    assert page.locator(".pill.own").inner_text().startswith("2")
    page.locator(".pill", has_text="4").click()
    page.click("#again")
    wait_for_answer(page)
    page.locator(".token[data-token='3']").hover()
    assert page.locator("#card tr").first.locator(".bar").count() == 4
    assert "4 experts" in page.locator("#stats").inner_text()


def test_a_text_beyond_the_context_goes_on_from_its_end(bundled, visit):
    page = visit(bundled.url)
    wait_for_model(page)
    set_control(page, "max_tokens", 16)
    page.fill("#prompt", "The wind came down from the hills. " * 160)
    page.keyboard.press("Control+Enter")
    page.locator("#failure").wait_for()
    assert "1024" in page.locator("#failure-text").inner_text().replace(",", "")
    page.locator("#failure button", has_text="Go on from the end").click()
    wait_until(lambda: page.locator(".token").count() > 3, page)
    wait_for_answer(page)
    assert page.locator("#failure").is_hidden()
