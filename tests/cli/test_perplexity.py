"""`tramontane perplexity`, run as a function of its arguments."""

import json
from pathlib import Path

import pytest

from tests.model_folder import save_tiny_model
from tramontane.cli.main import run_command


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "tales.jsonl"
    records = [{"text": f"The cat number {i} sat.", "split": "valid"} for i in range(5)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_scores_each_domain(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    arguments = ["perplexity", str(folder), "--source", f"tales={corpus}"]
    assert run_command([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    tales = answer["domains"]["tales"]
    assert tales["num_bytes"] == 5 * len("The cat number 0 sat.")
    assert answer["mean"] == tales["bits_per_byte"] > 0
    assert all(sum(layer["shares"]) == pytest.approx(1.0) for layer in tales["layers"])
    assert run_command(arguments) == 0
    assert f"{tales['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out


def test_a_context_that_the_model_lacks_is_refused(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "model")
    for length in ("0", "257"):
        arguments = ["perplexity", str(folder), "--source", str(corpus), "--seq-len", length]
        assert run_command(arguments) == 1
        assert f"--seq-len is {length}" in capsys.readouterr().err


def test_a_missing_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny_model(tmp_path / "model")
    assert run_command(["perplexity", str(folder), "--source", "nowhere.jsonl"]) == 1
    assert "nowhere.jsonl" in capsys.readouterr().err
