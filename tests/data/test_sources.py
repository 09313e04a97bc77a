"""What is read from each format, how it is split, and what a bad file is told."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from tests.data.files import make_stories, write_records
from tramontane.data.sources import (
    MAX_LINE_BYTES,
    Source,
    parse_source,
    read_documents,
    require_distinct_domains,
)
from tramontane.errors import ConfigError, DataError

PRETRAIN = Path(__file__).parents[3] / "shared" / "data" / "pretrain"


def read_both(path: Path) -> tuple[list[str], list[str]]:
    source = Source("d", str(path))
    train = read_documents(source, split="train")
    return list(train), list(read_documents(source, split="valid"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_records_go_where_their_split_says(tmp_path: Path, name: str) -> None:
    texts = ["one\u2028line", "two\n\nlines\r\n", "\u65e5\u672c \U0001f600"]
    records = [
        {"text": text, "split": split, "id": 1}
        for text, split in zip(texts, ["train", "valid", "train"], strict=True)
    ]
    assert read_both(write_records(tmp_path / name, records)) == ([texts[0], texts[2]], [texts[1]])


def test_records_without_split_are_split_by_their_text_alone(tmp_path: Path) -> None:
    stories = make_stories(1000)
    train, valid = read_both(write_records(tmp_path / "a.jsonl", [{"text": s} for s in stories]))
    assert sorted(train + valid) == sorted(stories)
    assert 20 <= len(valid) <= 90  # 50 expected, standard deviation 7
    again = read_both(write_records(tmp_path / "b.jsonl", [{"text": s} for s in stories[::-1]]))
    assert again == (train[::-1], valid[::-1])


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_the_end_of_a_plain_text_is_held_out_from_a_line_start(tmp_path: Path, name: str) -> None:
    text = "".join(f"line {number} \u00e9\r\n" for number in range(200))
    data = text.encode("utf-8")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (train,), (valid,) = read_both(tmp_path / name)
    assert train + valid == text
    assert 0.03 < len(valid) / len(text) <= 0.05
    assert valid.startswith("line 191")


def test_a_plain_text_of_one_line_is_split_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 99 + "\n")
    assert read_both(tmp_path / "a.txt") == (["x" * 95], ["xxxx\n"])


GOOD = b'{"text": "fine"}\n'
BAD_LINES = {
    b'{"text": "\xff"}': "byte 10 of the line is not UTF-8",
    b'{"text": ': "not JSON",
    b"[1]": "must be a JSON object, not list",
    b'{"body": "x"}': r"no text in field 'text'; the record has \['body'\]",
    b'{"text": 7}': "no text in field 'text'",
    b'{"text": " \\n"}': "is empty; remove the record",
    b'{"text": "\\ud800"}': "lone surrogate",
    b'{"text": "x", "split": "test"}': "split is 'test'",
    b"[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_record_is_named_by_file_and_line(tmp_path: Path, line: bytes) -> None:
    """T23."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=rf"a\.jsonl:3: .*{BAD_LINES[line]}"):
        read_both(path)


def test_a_line_of_200_mb_is_named_and_not_read(tmp_path: Path) -> None:
    """T23: memory is bounded by the limit, whatever the line unpacks to."""
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 10**6)
        file.write(b'"}\n')
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:2: the line is longer than 67,108,864"):
        read_both(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * MAX_LINE_BYTES


def test_a_line_at_the_limit_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tramontane.data.sources.MAX_LINE_BYTES", len(GOOD))
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + GOOD)
    assert sum(map(len, read_both(path))) == 2


def test_another_text_field_can_be_named(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"body": "x", "split": "train"}])
    source = Source("d", str(path), text_field="body")
    assert list(read_documents(source, split="train")) == ["x"]


def test_bad_bytes_in_a_plain_text_are_named_by_line(tmp_path: Path) -> None:
    """T23."""
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    with pytest.raises(DataError, match=r"a\.txt:3: byte 11 of the file is not UTF-8"):
        read_both(tmp_path / "a.txt")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"text": "x" * 1000}).encode())
    damaged = {"cut": whole[:-12], "plain": b"not gzip at all", "torn": whole[:20] + b"\xff" * 20}
    for name, content in damaged.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.jsonl\.gz: cannot be read"):
            read_both(tmp_path / f"{name}.jsonl.gz")
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot be read"):
        read_both(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("d/tales.jsonl.gz", Source("tales", "d/tales.jsonl.gz", 1.0)),
        ("d/tales.txt:2.5", Source("tales", "d/tales.txt", 2.5)),
        ("fr=d/tales.txt", Source("fr", "d/tales.txt", 1.0)),
        ("fr=d/a=b.txt:3", Source("fr", "d/a=b.txt", 3.0)),
    ],
)
def test_a_source_is_written_in_one_word(spec: str, expected: Source) -> None:
    assert parse_source(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.txt:heavy", "'heavy' is not a weight"),
        ("a.txt:0", "weight is 0.0, but must be positive"),
        ("a.txt:nan", "weight is nan"),
        ("a.csv", "must end in one of .jsonl"),
        ("a b=a.txt", "domain name 'a b'"),
        ("../x=a.txt", "domain name '../x'"),
    ],
)
def test_a_bad_source_is_explained(spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_source(spec)


def test_two_sources_of_one_domain_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"x/a\.txt and y/a\.txt are both domain a"):
        require_distinct_domains([parse_source("x/a.txt"), parse_source("y/a.txt")])
    with pytest.raises(ConfigError, match="no text source"):
        require_distinct_domains([])


@pytest.mark.skipif(not PRETRAIN.is_dir(), reason=f"no corpus at {PRETRAIN}")
def test_the_shared_corpus_is_read_whole() -> None:
    train, valid = read_both(PRETRAIN / "storybooks.jsonl.gz")
    assert len(train) + len(valid) == 890
    assert sum(len(text) for text in train + valid) == 1_710_731
