"""The renderer: what becomes of Markdown, and that a stream ends as the whole text does."""

import random

import pytest

from tests.server.page.scripted_server import Script, describe_model, serve_script

DRAW = """async (texts) => {
  const { Markdown } = await import("./static/markdown.js");
  return texts.map((text) => {
    const root = document.createElement("div");
    new Markdown(root).update({ text });
    return root.innerHTML;
  });
}"""
# Streams [text, where it is cut] that do not end as the whole text; a chunk may be a token.
DRAW_STREAMS = """async ([streams, isTraced]) => {
  const [{ Markdown }, { Trace }] = await Promise.all(
    [import("./static/markdown.js"), import("./static/trace.js")]);
  const draw = (text, cuts, isStreamed) => {
    const root = document.createElement("div");
    const drawing = new Markdown(root);
    const trace = isTraced ? new Trace(2, 2, 1) : undefined;
    let from = 0;
    for (const to of [...cuts, text.length]) {
      const piece = { text: text.slice(from, to), token_id: 0 };
      trace?.push({ ...piece, experts: [[0], [to % 2]], weights: [[1], [1]] });
      from = to;
      if (isStreamed) drawing.update({ text: text.slice(0, to), trace });
    }
    if (!isStreamed) drawing.update({ text, trace });
    return root.innerHTML;
  };
  return streams.filter(([text, cuts]) => draw(text, cuts, true) !== draw(text, cuts, false));
}"""
READ = """async (text) => {
  const [{ Markdown }, { Trace }] = await Promise.all(
    [import("./static/markdown.js"), import("./static/trace.js")]);
  const trace = new Trace(2, 2, 1);
  for (let from = 0; from < text.length; from += 3) {
    trace.push({ text: text.slice(from, from + 3), token_id: 0, experts: null, weights: null });
  }
  return [undefined, trace].map((trace) => {
    const root = document.createElement("div");
    new Markdown(root).update({ text, trace });
    return root.textContent;
  });
}"""

CASES = {
    "plain": ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    "emphasis": ("a **b *c* d** _e_ ***f***",
                 "<p>a <strong>b <em>c</em> d</strong> <em>e</em> <strong><em>f</em></strong></p>"),
    "no emphasis": ("2 * 3 * 4, a_b_c, **open", "<p>2 * 3 * 4, a_b_c, **open</p>"),
    "code": ("a `b *c*` ``d ` e``", "<p>a <code>b *c*</code> <code>d ` e</code></p>"),
    "fence": ("```py\na  # *b*\n\nc\n```\nd",
              '<pre tabindex="0"><code>a  # *b*\n\nc</code></pre><p>d</p>'),
    "open fence": ("~~~\na\n``", '<pre tabindex="0"><code>a\n``</code></pre>'),
    "list": ("- a\n- b\n  c\n\n- d",
             "<ul><li><p>a</p></li><li><p>b\nc</p></li><li><p>d</p></li></ul>"),
    "numbers": ("3. a\n4. b\n\nc", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol><p>c</p>'),
    "nested": ("1. a\n   - b\n     - c\n   - d",
               '<ol start="1"><li><p>a</p><ul><li><p>b</p><ul><li><p>c</p></li></ul></li>'
               "<li><p>d</p></li></ul></li></ol>"),
    "indented list": (" - a\n - b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    "quote": ("> a\n> > b\n\nc",
              "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
    "heading": ("# a\n###### *b*\ntext", "<h3>a</h3><h6><em>b</em></h6><p>text</p>"),
    "rule": ("a\n\n---\n* * *\n- x", "<p>a</p><hr><hr><ul><li><p>x</p></li></ul>"),
    "link": ("[*a*](https://b.c/d?e=f)",
             '<p><a href="https://b.c/d?e=f" title="https://b.c/d?e=f" target="_blank" '
             'rel="noopener noreferrer nofollow"><em>a</em></a></p>'),
    "no link": ("[a](ftp://b) [c] (d) [e](/f)", "<p>[a](ftp://b) [c] (d) [e](/f)</p>"),
    "markup": ("<b>&amp;</b>", "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>"),
    "empty": ("\n \n", ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def page(browser):
    """Any page of ours, for its modules."""
    with serve_script(Script([describe_model("m")], lambda _: [])) as script:
        page = browser.new_page()
        page.goto(script.url)
        yield page
        page.close()


def test_each_form_of_markdown(page):
    drawn = page.evaluate(DRAW, [text for text, _ in CASES.values()])
    assert dict(zip(CASES, drawn, strict=True)) == {n: html for n, (_, html) in CASES.items()}


@pytest.mark.parametrize("is_traced", [False, True], ids=["text", "tokens"])
def test_a_stream_ends_as_the_whole_text(page, is_traced):
    """Cut anywhere, and after every character."""
    rng = random.Random(7)
    texts = [make_text(rng) for _ in range(150)]
    streams = [[text, list(range(1, len(text)))] for text in texts]
    streams += [[text, sorted(rng.sample(range(1, len(text)), len(text) // 3))] for text in texts]
    assert page.evaluate(DRAW_STREAMS, [streams, is_traced]) == []


def test_tokens_do_not_change_what_is_read(page):
    rng = random.Random(8)
    for _ in range(40):
        plain, traced = page.evaluate(READ, make_text(rng))
        assert plain == traced


@pytest.mark.parametrize(
    "unit", ["*", "**", "_a", "[", "[a](", "`", "``", "> ", "- ", "  - ", "1. ", "#", "~~~\n", "\n",
             "* ", "***a "],
)  # fmt: skip
def test_no_text_is_slow_or_deep(page, unit):
    """One that looks far ahead from every mark, or goes down with each, ends at none of them."""
    (drawn,) = page.evaluate(DRAW, [unit * (40_000 // len(unit))])
    assert isinstance(drawn, str)


def make_text(rng: random.Random) -> str:
    """Marks and words in no order."""
    parts = ["a", "word ", "*", "**", "_", "`", "```\n", "\n", "\n\n", "- ", "  - ", "1. ", "> ",
             "# ", "[x](https://a.b)", " ", "---\n", "\t", "<b>",
             "\u00e9\u4e2d\U0001f43a"]  # fmt: skip
    return "".join(rng.choice(parts) for _ in range(rng.randint(2, 60)))
