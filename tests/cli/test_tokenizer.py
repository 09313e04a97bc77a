"""`tramontane tokenizer train` makes a tokenizer that can be loaded, or says why it cannot."""

from pathlib import Path

import pytest

from tests.data.files import make_stories, write_records
from tramontane.cli.main import run_command
from tramontane.tokenizer.loading import load_tokenizer


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return write_records(tmp_path / "tales.jsonl", [{"text": t} for t in make_stories(60)])


def test_a_tokenizer_is_trained_and_saved(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "tokenizer"
    sizes = ["--vocab-size", "280", "--sample-chars", "3000"]
    assert run_command(["tokenizer", "train", f"t={stories}:2", "--out", str(out), *sizes]) == 0
    assert load_tokenizer(out).vocab_size == 280
    assert "bytes per token" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["tokenizer", "train", str(stories), "--out", str(tmp_path)]) == 1
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.jsonl"], "gone.jsonl: cannot be read"),
        (["text.csv"], "must end in one of"),
        (["a.txt", "--vocab-size", "100"], "must be at least 259"),
    ],
)
def test_errors_are_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    assert run_command(["tokenizer", "train", *arguments, "--out", str(out)]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_no_source_is_wrong_usage(tmp_path: Path) -> None:
    assert run_command(["tokenizer", "train", "--out", str(tmp_path / "out")]) == 2
