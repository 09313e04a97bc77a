"""Desktop and phone, light and dark, eyes of all kinds."""

import pytest

from tests.server.page.conftest import PHONE, wait_for_answer, wait_for_model
from tests.server.page.scripted_server import Script, describe_model, end_stream, say, serve_script

# Contrast of text and ground, painted by the browser itself: any form of colour works.
CONTRAST = """(selectors) => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (...colors) => {
    for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return selectors.map((selector) => {
    const node = document.querySelector(selector);
    const grounds = [];
    for (let n = node; n; n = n.parentElement) grounds.unshift(getComputedStyle(n).backgroundColor);
    const ground = paint("white", ...grounds);
    const text = paint(`rgb(${ground})`, getComputedStyle(node).color);
    const [low, high] = [light(text), light(ground)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
}"""
EXPERTS = 16


def answer(body):
    """A token for each of 16 experts."""
    pieces = [{"text": f" t{e}", "token_id": e, "experts": [[e, (e + 1) % EXPERTS]] * 2,
               "weights": [[0.7, 0.3]] * 2} for e in range(EXPERTS)]  # fmt: skip
    yield say("".join(p["text"] for p in pieces), is_chat="messages" in body, routing=pieces)
    yield from end_stream(EXPERTS)


@pytest.fixture(scope="module")
def script():
    with serve_script(Script([describe_model("m", num_experts=EXPERTS)], answer)) as script:
        yield script


def open_answer(visit, script, **options):
    page = visit(script.url, **options)
    wait_for_model(page)
    page.fill("#prompt", "Once")
    page.click("#send")
    page.locator(".token").last.wait_for()
    wait_for_answer(page)
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_ground(visit, script, scheme):
    page = open_answer(visit, script, color_scheme=scheme, reduced_motion="reduce")
    page.locator(".token").first.hover()
    tokens = [f".token.x{e}" for e in range(EXPERTS)]
    chips = [f".chip.x{e}" for e in range(EXPERTS)]
    others = [".story .user", "#glass-note", "#prompt", "#send", "#stats span", "#reset",
              "#model-facts", "#card .weights", "#card .bar", ".field output",
              "#conversations .title"]  # fmt: skip
    ratios = page.evaluate(CONTRAST, tokens + chips + others)
    low = {s: r for s, r in zip(tokens + chips + others, ratios, strict=True) if r < 4.5}
    assert low == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_two_experts_look_alike(visit, script, scheme):
    """Their colours differ, or their line is above the text instead of below."""
    page = open_answer(visit, script, color_scheme=scheme)
    read = """tokens => tokens.map(t => { const s = getComputedStyle(t);
      return s.backgroundColor + " " + s.boxShadow })"""
    looks = page.locator(".token").evaluate_all(read)
    assert len(set(looks)) == EXPERTS
    page.locator("label:has(#number-tokens)").click()
    numbers = "tokens => tokens.map(t => getComputedStyle(t, '::after').content)"
    assert page.locator(".token").evaluate_all(numbers) == [f'"{e}"' for e in range(EXPERTS)]


def test_the_theme_follows_the_system_until_it_is_chosen(visit, script):
    ground = "getComputedStyle(document.body).backgroundColor"
    page = visit(script.url, color_scheme="dark")
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert light != dark
    page.click("#theme")
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark


def test_a_phone_has_everything_in_drawers(visit, script):
    page = open_answer(visit, script, **PHONE)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 375
    for drawer in ("sidebar", "panel"):
        assert page.locator(f"#{drawer}").evaluate("node => node.inert")
        page.tap(f"#open-{drawer}")
        assert page.locator(f"#open-{drawer}").get_attribute("aria-expanded") == "true"
        assert page.locator(f"#{drawer}").evaluate("node => node.contains(document.activeElement)")
        assert page.evaluate(width) == 375
        page.keyboard.press("Escape")
        assert page.locator(f"#{drawer}").evaluate("node => node.inert")
    page.tap("#open-panel")
    page.tap("#heat tr[data-layer='0'] td[data-expert='3']")
    assert page.locator(".token.lit").all_text_contents() == ["t2", "t3"]
    page.tap("#heat tr[data-layer='0'] td[data-expert='3']")
    assert page.locator(".token.lit").count() == 0
    page.tap("#close-panel")
    page.tap(".token.x5")
    box = page.locator("#card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375
    page.tap("#bar")
    assert page.locator("#card").is_hidden()


def test_every_control_has_a_name_and_the_tab_key_reaches_it(visit, script):
    page = open_answer(visit, script)
    nameless = """() => [...document.querySelectorAll("button, input, select, textarea, table")]
      .filter((n) => !n.closest("#card, #transcript"))
      .filter((n) => !(n.ariaLabel || n.labels?.length || n.textContent.trim()))
      .map((n) => n.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.locator("#new").focus()
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    wanted = {"prompt", "send", "undo", "heat", "color-tokens", "temperature", "seed", "theme"}
    assert wanted <= set(seen)
    assert any(name.startswith("token") for name in seen)


def test_who_wants_no_motion_gets_none(visit, script):
    page = open_answer(visit, script, reduced_motion="reduce")
    moving = """() => [...document.querySelectorAll("*")]
      .flatMap((node) => [getComputedStyle(node), getComputedStyle(node, "::after")])
      .filter((s) => s.animationName !== "none" || s.transitionDuration !== "0s").length"""
    assert page.evaluate(moving) == 0


def test_a_screen_reader_is_told_whole_sentences(visit):
    def answer(body):
        for text in ("The wind", " came. It", " went", ' "home".', " And"):
            yield say(text, is_chat=False)
        yield from end_stream(5)

    with serve_script(Script([describe_model("m", num_experts=None)], answer)) as script:
        page = visit(script.url)
        wait_for_model(page)
        page.evaluate(
            """() => {
              window.told = [];
              new MutationObserver(([{ target }]) => told.push(target.textContent))
                .observe(document.getElementById("announcer"), { childList: true });
            }"""
        )
        page.fill("#prompt", "Once")
        page.click("#send")
        wait_for_answer(page)
        told = page.evaluate("told")
        assert "".join(told) == 'The wind came. It went "home". And 5 tokens.'
        assert page.locator("#announcer").get_attribute("aria-live") == "polite"
