"""The page's files, read as text: what the policy forbids is not even written."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.server.page.scripted_server import POLICY
from tramontane.server.page import STATIC_FOLDER, load_page

FILES = sorted(STATIC_FOLDER.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|"
    r"srcdoc|setHTML|\beval\b|new Function|setAttribute\(\"(?:on|style)|\.cssText|postMessage|"
    r"XMLHttpRequest|WebSocket|EventSource|sendBeacon|\.cookie|importScripts|serviceWorker"
)
KNOWN_ADDRESSES = {"http://www.w3.org/2000/svg"}  # a name, which nobody fetches


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text_in: dict[str, str] = {}

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        last = self.tags[-1][0] if self.tags else ""
        self.text_in[last] = self.text_in.get(last, "") + data


@pytest.fixture(scope="module")
def index() -> Tags:
    tags = Tags()
    tags.feed((STATIC_FOLDER / "index.html").read_text())
    return tags


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_short_plain_and_ask_nobody(path: Path):
    """W10"""
    content = path.read_text(encoding="ascii")
    assert content.count("\n") < 300
    if path.suffix in (".js", ".css"):
        assert max(map(len, content.splitlines())) <= 100
    assert set(re.findall(r"https?://\w[\w./-]+", content)) <= KNOWN_ADDRESSES
    assert not re.search(r"url\(|@import", content)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_never_parse_markup_or_run_text(path: Path):
    """W01"""
    assert FORBIDDEN.findall(path.read_text()) == []


def test_the_markup_has_no_scripts_handlers_or_styles_of_its_own(index):
    """W01"""
    assert index.text_in.get("script", "").strip() == ""
    for tag, attributes in index.tags:
        assert tag not in ("style", "iframe", "object", "embed", "base"), tag
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes


def test_every_file_is_used_and_is_there(index):
    named = {a["href"] for t, a in index.tags if t == "link"}
    named |= {a["src"] for t, a in index.tags if t in ("script", "img")}
    found = {Path(name).name for name in named} | {"index.html"}
    for path in SCRIPTS:
        found |= {Path(name).name for name in re.findall(r'from "\./([\w.]+)"', path.read_text())}
    assert found == {path.name for path in FILES}


def test_icons_and_ids_that_scripts_name_are_there(index):
    ids = {a["id"] for _, a in index.tags if "id" in a}
    content = "".join(path.read_text() for path in SCRIPTS)
    assert set(re.findall(r'byId\("([\w-]+)"\)', content)) <= ids
    icons = set(re.findall(r'icon: "(\w+)"', content))
    assert {f"icon-{name}" for name in icons} <= ids
    uses = {a["href"].removeprefix("#") for t, a in index.tags if t == "use"}
    assert uses <= ids


def test_the_server_sends_exactly_these_files():
    assert set(load_page()) == {"/", *(f"/static/{path.name}" for path in FILES)}


def test_the_policy_trusts_the_server_alone():
    sources = {rule.split()[0]: rule.split()[1:] for rule in POLICY.split("; ")}
    assert sources["default-src"] == ["'none'"]
    assert "'unsafe-inline'" not in POLICY
    assert "'unsafe-eval'" not in POLICY
    assert sources["trusted-types"] == ["'none'"]
