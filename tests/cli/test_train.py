"""`tramontane train` from flags, and its exit codes."""

import json
from pathlib import Path

import pytest

from tramontane.cli.main import run_command
from tramontane.engine.llm import LLM
from tramontane.engine.sampling_params import SamplingParams


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    texts = [f"One day the {a} met the {b}." for a in ("cat", "dog") for b in ("sun", "moon")] * 8
    records = [
        {"text": text, "split": "valid" if i % 8 == 0 else "train"} for i, text in enumerate(texts)
    ]
    corpus = tmp_path / "tales.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = tmp_path / "run.toml"
    config.write_text(
        "[model]\ndim = 32\nn_layers = 1\nhead_dim = 16\nhidden_dim = 32\nn_heads = 2\n"
        "n_kv_heads = 1\nmax_seq_len = 64\n[model.moe]\nnum_experts = 4\n"
    )
    return [
        "train", str(config), "--source", str(corpus), "--out", str(tmp_path / "run"),
        "--vocab-size", "262", "--seq-len", "32", "--batch-size", "2", "--steps", "3",
        "--dtype", "float32", "--eval-every", "0", "--sample-every", "2", "--threads", "1",
    ]  # fmt: skip


def test_flags_train_a_model_that_answers(arguments: list[str], tmp_path: Path) -> None:
    assert run_command(arguments) == 0
    run = tmp_path / "run"
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log if "sample" in record] == [2]
    assert LLM(run / "model").generate("One", SamplingParams(max_tokens=3, seed=0)).token_ids


def test_flags_of_checkpoints_text_and_speed(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T25: and what memory it takes is said before the first step."""
    shared = tmp_path / "text"
    more = ["--save-every", "1", "--keep-checkpoints", "1", "--peak-tflops", "0.5",
            "--tokens-dir", str(shared)]  # fmt: skip
    assert run_command([*arguments, *more]) == 0
    assert len(list(shared.iterdir())) == 2
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-3"]
    said = capsys.readouterr().err
    assert said.index("memory: about ") < said.index("MFU is of 0.50 TFLOP/s")


def test_a_run_is_not_started_over(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(arguments) == 0
    assert run_command(arguments) == 1
    assert "--resume" in capsys.readouterr().err
    assert run_command([*arguments, "--resume"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--source", "nowhere.txt"], "nowhere.txt"),
        (["--model", "gpt"], "no preset named 'gpt'"),
        (["--lr", "-1"], "lr is -1"),
    ],
)
def test_errors_are_explained(
    arguments: list[str],
    changes: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command([*arguments, *changes]) == 1
    assert message in capsys.readouterr().err


def test_an_empty_corpus_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tales.jsonl").write_text("")
    assert run_command(arguments) == 1
    assert "tales.jsonl" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert run_command([*arguments, "--stps", "3"]) == 2
