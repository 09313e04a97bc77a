"""The tokenizer's sample has the proportions of the mixture, and is spread over each file."""

from pathlib import Path

import pytest

from tests.data.files import make_stories, write_records
from tramontane.data.sampling import sample_documents
from tramontane.data.sources import Source
from tramontane.errors import DataError


def make_source(folder: Path, domain: str, texts: list[str], weight: float) -> Source:
    records = [{"text": text, "split": "train"} for text in texts]
    records.append({"text": "held out", "split": "valid"})
    return Source(domain, str(write_records(folder / f"{domain}.jsonl", records)), weight)


def test_each_domain_gives_characters_by_its_weight(tmp_path: Path) -> None:
    large = make_source(tmp_path, "large", [f"L{i:04} " * 5 for i in range(500)], 3.0)
    small = make_source(tmp_path, "small", [f"S{i:04} " * 5 for i in range(20)], 1.0)
    sample = list(sample_documents([large, small], max_chars=8000))
    by_domain = {name: [t for t in sample if t.startswith(name)] for name in "LS"}
    assert sum(map(len, by_domain["L"])) == 6000
    assert sum(map(len, by_domain["S"])) == 2000  # of 600 that exist: three times and a part
    assert "held out" not in sample
    firsts = sorted(int(text[1:5]) for text in by_domain["L"])
    assert firsts[0] < 10
    assert firsts[-1] > 490


def test_one_long_document_is_cut(tmp_path: Path) -> None:
    source = make_source(tmp_path, "book", ["ab" * 5000], 1.0)
    assert list(sample_documents([source], max_chars=1001)) == [("ab" * 5000)[:1001]]


def test_the_sample_is_deterministic(tmp_path: Path) -> None:
    source = make_source(tmp_path, "d", make_stories(50), 1.0)
    first = list(sample_documents([source], max_chars=700))
    assert first == list(sample_documents([source], max_chars=700))


def test_a_domain_without_text_is_named(tmp_path: Path) -> None:
    source = make_source(tmp_path, "none", [], 1.0)
    with pytest.raises(DataError, match=r"none\.jsonl: no training text; domain none is empty"):
        list(sample_documents([source], max_chars=10))
