"""Every file, command and preset that the documents name exists."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tramontane.cli.main import build_app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/*.md")]
# A path is what stands in back quotes and begins with one of these folders.
_PATH = re.compile(
    r"`((?:tramontane|tests|docs|recipes|benchmarks|csrc|\.ci)/[\w./-]*|[\w.-]+\.(?:md|toml|txt))`"
)
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
_MAKE = re.compile(r"^(?:\$ )?make (\w+)|`make (\w+)`", re.MULTILINE)
_VERB = re.compile(r"^(?:\$ )?tramontane (\w+)|`tramontane (\w+)[ `]", re.MULTILINE)


def find_all(pattern: re.Pattern[str], document: Path) -> Iterator[str]:
    for match in pattern.finditer(document.read_text(encoding="utf-8")):
        yield next(group for group in match.groups() if group)


def show(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=show)
def test_paths_exist(document: Path) -> None:
    missing = [
        name
        for name in find_all(_PATH, document)
        if not (ROOT / name).exists() and not (document.parent / name).exists()
    ]
    missing += [link for link in find_all(_LINK, document) if not (document.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=show)
def test_commands_exist(document: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(find_all(_MAKE, document)) <= targets
    assert set(find_all(_VERB, document)) <= set(build_app())


def test_documents_are_found() -> None:
    assert {"architecture.md", "numerics.md", "CONTRIBUTING.md"} <= {d.name for d in DOCUMENTS}


def test_tested_versions_satisfy_the_requirements() -> None:
    """constraints.txt names every dependency of the base and of the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = re.findall(
        r"^([\w-]+)==\d[\w.]*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    names = {re.match(r"[\w-]+", line).group().replace("_", "-").lower() for line in needed}
    assert names <= set(pinned)
