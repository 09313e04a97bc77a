"""Templates from a stranger: they neither reach anything nor run for long."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tokenizer.templates import BOMBS, ESCAPES
from tramontane.errors import RequestError, TokenizerError
from tramontane.tokenizer.chat import ChatFormat
from tramontane.tokenizer.chat_loading import chat_format_from_gguf, load_chat_format
from tramontane.tokenizer.template_format import TemplateFormat
from tramontane.tokenizer.template_sandbox import MAX_SOURCE_CHARS
from tramontane.tokenizer.tokenizer import Tokenizer

USER = [{"role": "user", "content": "hello"}]
Route = Callable[[str, Tokenizer, Path], ChatFormat | None]


def by_jinja(source: str, tokenizer: Tokenizer, folder: Path) -> ChatFormat | None:
    (folder / "chat_template.jinja").write_text(source)
    return load_chat_format(folder, tokenizer)


def by_config(source: str, tokenizer: Tokenizer, folder: Path) -> ChatFormat | None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    return load_chat_format(folder, tokenizer)


def by_gguf(source: str, tokenizer: Tokenizer, folder: Path) -> ChatFormat | None:
    return chat_format_from_gguf({"tokenizer.chat_template": source}, tokenizer, origin="m.gguf")


@pytest.mark.parametrize("route", [by_jinja, by_config, by_gguf])
@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_escapes(
    tokenizer: Tokenizer, tmp_path: Path, name: str, route: Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C03."""
    monkeypatch.chdir(tmp_path)
    source = ESCAPES[name].replace("CANARY", str(tmp_path / "canary"))
    with pytest.raises(TokenizerError, match="chat template of"):
        route(source, tokenizer, tmp_path).render(USER)  # type: ignore[union-attr]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_an_error(tokenizer: Tokenizer, name: str) -> None:
    """C03: also in a thread that is not the main one, where no signal arrives."""
    caught: list[Exception] = []

    def run() -> None:
        try:
            TemplateFormat(BOMBS[name], tokenizer, origin="x").render(USER)
        except TokenizerError as error:
            caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert len(caught) == 1
    assert "the chat template of x" in str(caught[0])


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{", "{% endif %}", "{{ 1/0 }}", "{{ undefined.x }}", "{{ 'a' + 1 }}",
     "{{ [][1].x }}", "{{ messages|nofilter }}", "{{ (" * 3000, "{{" + "[" * 5000 + "]" * 5000
     + "}}", "{{ 'x' is notest }}", "{{ none() }}", "{% break %}"],
)  # fmt: skip
def test_a_mistake_in_a_template_is_named(tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(TokenizerError, match="chat template of m"):
        TemplateFormat(source, tokenizer, origin="m").render(USER)


def test_a_template_that_is_too_long_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=f"at most {MAX_SOURCE_CHARS}"):
        TemplateFormat("x" * (MAX_SOURCE_CHARS + 1), tokenizer, origin="m")


def test_the_template_itself_may_refuse(tokenizer: Tokenizer) -> None:
    source = "{{ raise_exception('only ' ~ 'poems') }}"
    with pytest.raises(RequestError, match="refuses: only poems"):
        TemplateFormat(source, tokenizer, origin="m").render(USER)


@pytest.mark.parametrize("template", [5, {"a": 1}, [{"name": "rag", "template": "x"}], [], b"\xff"])
def test_a_template_that_is_no_text_is_named(
    tokenizer: Tokenizer, template: Any, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=r"m\.gguf"):
        chat_format_from_gguf({"tokenizer.chat_template": template}, tokenizer, origin="m.gguf")
    if not isinstance(template, bytes):
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({"chat_template": template}))
        with pytest.raises(TokenizerError, match="tokenizer_config"):
            load_chat_format(tmp_path, tokenizer)


def test_time_and_loops_and_long_messages_are_no_problem(tokenizer: Tokenizer) -> None:
    source = (
        "{{ strftime_now('%Y')|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% for i in range(1000) %}.{% endfor %}"
    )
    messages = [{"role": "user", "content": "x" * 10_000}] * 100
    text = TemplateFormat(source, tokenizer, origin="m").render(messages)
    assert text == "4" + "x" * 1_000_000 + "." * 1000
