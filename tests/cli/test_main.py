"""The command itself: verbs, messages and exit codes."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from tramontane import __version__
from tramontane.cli import main as cli
from tramontane.cli.main import run_command
from tramontane.errors import CheckpointError

VERBS = ("run", "train", "perplexity", "show", "estimate", "convert", "quantize", "pull", "list",
         "rm", "verify", "doctor")  # fmt: skip
_WRITE_AFTER_INPUT = """
import sys
from tramontane.cli import main as cli
app = cli.build_app()
app.command(lambda: print(sys.stdin.read(), flush=True), name="write")
cli.build_app = lambda _: app
sys.exit(cli.run_command(["write"]))
"""


def use_verb(monkeypatch: pytest.MonkeyPatch, verb: Callable[[], None]) -> None:
    """Add a verb, `fail`."""
    app = cli.build_app()
    app.command(verb, name="fail")
    monkeypatch.setattr(cli, "build_app", lambda _: app)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", [*VERBS, "tokenizer train"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*verb.split(), "--help"]) == 0
    assert f"Usage: tramontane {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "detail"),
    [
        ("pull", "HF_TOKEN"), ("pull", "Example: tramontane pull"), ("show", "Exit code 1"),
        ("estimate", "--ram 32"), ("verify", "SHA256SUMS"), ("perplexity", "bits per byte"),
    ],
)  # fmt: skip
def test_the_help_of_a_verb_has_the_details_of_its_docstring(
    verb: str, detail: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([verb, "--help"]) == 0
    assert detail in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", ["fly", "run --fly", "doctor --fly", "run --seed x"])
def test_wrong_usage_is_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert arguments.split()[-1] in captured.err


def test_an_error_of_ours_is_1_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise CheckpointError("model/x is missing; copy it")

    use_verb(monkeypatch, fail)
    assert run_command(["fail"]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "tramontane: error: model/x is missing; copy it\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/m/x"), "/m/x: Permission denied; check the n"),
        (OSError("no more"), "no more"),
    ],
)
def test_an_error_of_the_system_is_1_and_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError, said: str
) -> None:
    def fail() -> None:
        raise error

    use_verb(monkeypatch, fail)
    assert run_command(["fail"]) == 1
    assert capsys.readouterr().err.startswith(f"tramontane: error: {said}")


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    use_verb(monkeypatch, fail)
    assert run_command(["fail"]) == 130


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    use_verb(monkeypatch, fail)
    with pytest.raises(ZeroDivisionError):
        run_command(["fail"])


def test_a_reader_that_leaves_is_141_without_a_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITE_AFTER_INPUT],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    process.stdin.close()  # only now does it start to write
    error = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), error) == (141, b"")
