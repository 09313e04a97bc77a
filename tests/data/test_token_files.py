"""Token files hold every document, are made once, and appear whole or not at all."""

import errno
import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from tests.data.files import make_stories, write_records
from tramontane.data import token_files
from tramontane.data.sources import Source, read_documents
from tramontane.data.token_files import open_token_file, prepare_token_files
from tramontane.errors import CapacityError, ConfigError, DataError, StorageError
from tramontane.tokenizer.tokenizer import Tokenizer
from tramontane.tokenizer.trainer import train_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> Source:
    records = [
        {"text": text, "split": "valid" if number % 5 == 0 else "train"}
        for number, text in enumerate(make_stories(40))
    ]
    return Source("tales", str(write_records(tmp_path / "tales.jsonl", records)))


@pytest.mark.parametrize("chars_per_batch", [1, 200, 10**6])
def test_every_document_is_there_with_its_bytes(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    chars_per_batch: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(token_files, "_CHARS_PER_BATCH", chars_per_batch)
    files = prepare_token_files([source], tokenizer, tmp_path / "tokens")
    assert set(files) == {("tales", "train"), ("tales", "valid")}
    for (_, split), file in files.items():
        texts = list(read_documents(source, split=split))
        assert file.num_documents == len(texts)
        assert file.num_bytes == sum(len(text.encode("utf-8")) for text in texts)
        assert file.num_targets == sum(len(tokenizer.encode(text)) + 1 for text in texts)
        for index, text in enumerate(texts):
            expected = tokenizer.encode(text, bos=True, eos=True)
            assert file.document(index).tolist() == expected


def test_tokens_are_mapped_and_small(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = prepare_token_files([source], tokenizer, tmp_path)["tales", "train"]
    assert isinstance(file.tokens, np.memmap)
    assert file.tokens.dtype == np.uint16
    monkeypatch.setattr(tokenizer, "vocab_size", 2**16 + 1)
    wide = prepare_token_files([source], tokenizer, tmp_path / "wide")["tales", "train"]
    assert wide.tokens.dtype == np.uint32
    assert np.array_equal(wide.tokens, file.tokens)


def test_files_are_made_once(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_token_files([source], tokenizer, tmp_path)
    monkeypatch.setattr(Tokenizer, "encode_batch", None)  # would fail if it were called
    second = prepare_token_files([source], tokenizer, tmp_path)
    for key, file in first.items():
        assert file.fingerprint == second[key].fingerprint
        assert np.array_equal(file.tokens, second[key].tokens)


def test_other_text_or_another_tokenizer_makes_other_files(
    source: Source, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def fingerprint(by: Tokenizer) -> str:
        return prepare_token_files([source], by, tmp_path)["tales", "train"].fingerprint

    other = train_tokenizer(make_stories(30, seed=9), vocab_size=301)
    seen = {fingerprint(tokenizer), fingerprint(other)}
    with open(source.path, "ab") as file:
        file.write(b'{"text": "one more"}\n')
    seen.add(fingerprint(tokenizer))
    assert len(seen) == 3


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_empty_split_is_named(tokenizer: Tokenizer, tmp_path: Path, split: str) -> None:
    other = "valid" if split == "train" else "train"
    path = write_records(tmp_path / "a.jsonl", [{"text": "x", "split": other}])
    with pytest.raises(DataError, match=rf"a\.jsonl holds no {split} document: "):
        prepare_token_files([Source("a", str(path))], tokenizer, tmp_path / "tokens")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.gz"])
def test_an_empty_corpus_is_named(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"")
    with pytest.raises(DataError, match="holds no train document"):
        prepare_token_files([Source("a", str(tmp_path / name))], tokenizer, tmp_path / "tokens")


def test_a_failure_leaves_nothing_behind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine", "split": "train"}\n{"text": \xff}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        prepare_token_files([Source("a", str(path))], tokenizer, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


def test_missing_sources_and_repeated_domains_are_refused(
    source: Source, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        prepare_token_files([Source("a", "gone.txt")], tokenizer, tmp_path)
    with pytest.raises(ConfigError, match="both domain tales"):
        prepare_token_files([source, source], tokenizer, tmp_path)


def fail_with(code: int) -> object:
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (errno.ENOSPC, CapacityError, "the disk is full"),
        (errno.EACCES, StorageError, "cannot be written"),
    ],
)
def test_a_disk_that_fails_is_named(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    code: int, error: type[Exception], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "fsync", fail_with(code))
    with pytest.raises(error, match=message):
        prepare_token_files([source], tokenizer, tmp_path / "tokens")
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "byte_counts.npy", "meta.json"])
@pytest.mark.parametrize("keep", [None, 0, 10, -2])
def test_a_damaged_file_is_named(
    source: Source, tokenizer: Tokenizer, tmp_path: Path, name: str, keep: int | None
) -> None:
    prepare_token_files([source], tokenizer, tmp_path / "tokens")
    folder = next((tmp_path / "tokens").glob("tales-train-*"))
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if keep is not None:
        (folder / name).write_bytes(content[:keep])
    with pytest.raises(DataError, match=rf"{folder.name} is damaged .*delete it"):
        open_token_file(folder)
