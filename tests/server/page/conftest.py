"""A browser for the page: Debian's Chromium, which reaches this machine and nothing else."""

import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Names do not resolve; the sandbox of a root user is the container around it.
ARGUMENTS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
PHONE = {"size": (375, 812), "is_mobile": True, "has_touch": True}

Visit = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of one module: while it runs, no other event loop can start in this thread."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    """Opens pages. W10, W01: whatever a test did, no page broke its policy, raised an error, opened
    a dialog, asked another server for anything, or put a key into an address.
    """
    contexts: list[Any] = []
    problems: list[str] = []

    def open_page(url: str, *, size: tuple[int, int] = (1280, 800), **options: Any) -> Any:
        viewport = {"width": size[0], "height": size[1]}
        context = browser.new_context(viewport=viewport, accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: note_message(message))
        page.on("pageerror", lambda error: problems.append(f"raised {error}"))
        page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: note_request(request.url, url))
        page.goto(url)
        return page

    def note_message(message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load" not in message.text:
            problems.append(f"console: {message.text}")

    def note_request(asked: str, url: str) -> None:
        if not asked.startswith((url, f"blob:{url}")) or "?" in asked:
            problems.append(f"asked {asked}")

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def wait_for_model(page: Any) -> None:
    """Until the page knows the model."""
    page.locator("html:not(.starting)").wait_for()


def wait_for_answer(page: Any) -> None:
    """Until an answer that was asked for has ended."""
    page.locator("html:not(.running)").wait_for()


def wait_until(condition: Callable[[], bool], page: Any) -> None:
    """Of something that the page or the server does soon."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen in 30 seconds"
        page.wait_for_timeout(10)
