import io
import json
import subprocess
import sys

import pytest

from tests.model_folder import save_tiny_model
from tramontane import LLM, SamplingParams
from tramontane.cli.line_history import keep_history
from tramontane.cli.main import run_command
from tramontane.cli.run import _split_arguments
from tramontane.engine import bundled

GREEDY = ["--temperature", "0", "--max-tokens", "12"]
PROGRAM = [sys.executable, "-c", "from tramontane.cli.main import main; main()"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def answer(folder):
    """The greedy answer to "Hello"."""
    return LLM(folder).generate("Hello", SamplingParams(temperature=0, max_tokens=12)).text


@pytest.fixture
def pipe(monkeypatch):
    """Puts bytes on standard input."""

    def put(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    put(b"")
    return put


def test_answer_alone_goes_to_standard_output(folder, answer, pipe, capsys):
    assert run_command(["run", str(folder), "Hello", *GREEDY]) == 0
    captured = capsys.readouterr()
    assert captured.out == answer + "\n" * (not answer.endswith("\n"))
    assert captured.err == ""


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_standard_input_is_one_prompt(folder, answer, pipe, capsys, end):
    pipe(b"Hello" + end)
    assert run_command(["run", str(folder), *GREEDY]) == 0
    assert capsys.readouterr().out.startswith(answer)


def test_a_text_alone_goes_to_the_bundled_model(folder, pipe, capsys, monkeypatch):
    monkeypatch.setattr(bundled, "BUNDLED_MODEL", folder)
    assert run_command(["run", "Once upon a time", *GREEDY]) == 0
    expected = LLM(folder).generate(
        "Once upon a time", SamplingParams(temperature=0, max_tokens=12)
    )
    assert capsys.readouterr().out.startswith(expected.text)


def test_stop_texts_are_never_printed(folder, answer, pipe, capsys):
    first, second = answer[5], answer[3:5]
    flags = ["--stop", first, "--stop", second]
    assert run_command(["run", str(folder), "Hello", *GREEDY, *flags]) == 0
    text = answer[: min(answer.index(first), answer.index(second))]
    assert capsys.readouterr().out == text + "\n" * (not text.endswith("\n"))


def test_a_seed_repeats_the_answer(folder, pipe, capsys):
    answers = []
    for seed in ("5", "5", "6"):
        run_command(
            ["run", str(folder), "Hello", "--seed", seed, "--top-k", "50", "--min-p", "0.001"]
        )
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_stats_go_to_standard_error(folder, answer, pipe, capsys):
    assert run_command(["run", str(folder), "Hello", *GREEDY, "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(answer)
    for text in ("time to first token", "tokens/s", "peak memory", "layer  0", "layer  1", "most:"):
        assert text in captured.err
    assert "temperature 0" in captured.err


def test_stats_name_what_generation_config_changed(tmp_path, pipe, capsys):
    values = json.dumps({"temperature": 0.33, "max_new_tokens": 3})
    folder = save_tiny_model(tmp_path / "m", generation_config=values)
    assert run_command(["run", str(folder), "Hello", "--stats", "--max-tokens", "4"]) == 0
    err = capsys.readouterr().err
    assert "max_tokens 3, temperature 0.33 (from the model's generation_config.json)" in err
    assert "temperature 0.33" in err.partition("settings")[2]
    assert "max_tokens 4" in err.partition("settings")[2]


@pytest.mark.parametrize("flag", ["--experts", "--experts=0", "--experts=1"])
def test_experts_are_markers_outside_a_terminal(folder, answer, pipe, capsys, flag):
    assert run_command(["run", str(folder), "Hello", *GREEDY, flag]) == 0
    captured = capsys.readouterr()
    layer = int(flag[-1]) if flag[-1].isdigit() else 1  # the middle of two
    params = SamplingParams(temperature=0, max_tokens=12)
    experts = LLM(folder).generate("Hello", params, collect_routing=True).selected_experts
    first_expert = experts[6, layer, 0]  # of the answer's first token: <s> and five letters precede
    assert captured.out.startswith(f"[e{first_expert}]")
    assert "[e-]" in captured.out
    assert f"layer {layer}" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "nan"], "temperature is nan; it must be"),
        (["--top-p", "1.5"], "top_p is 1.5; it must be a number above 0, up to 1"),
        (["--max-tokens=-1"], "max_tokens is -1; it must be a whole number from 0"),
        (["--stop", ""], "stop holds ''"),
        (["--experts=2"], "this model has the layers 0 to 1"),
    ],
)
def test_values_out_of_range_are_explained(folder, pipe, capsys, arguments, message):
    assert run_command(["run", str(folder), "Hello", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("tramontane: error: ")
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["Hello", "extra"], b"", "Hello"),
        ([""], b"", "prompt is empty"),
        (["FOLDER", ""], b"", "prompt is empty"),
        (["FOLDER"], b"", "prompt is empty"),
        (["FOLDER"], b"\n", "prompt is empty"),
        (["FOLDER"], b"ab\xff", "not UTF-8 at byte 2"),
        (["FOLDER"], b"x" * 300, "301 tokens"),
        (["word"], b"", "echo word | tramontane run"),
    ],
)
def test_bad_requests_are_explained(folder, pipe, capsys, arguments, content, message):
    pipe(content)
    arguments = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    assert run_command(["run", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_wrong_usage_exits_with_2(folder, pipe, capsys):
    assert run_command(["run", str(folder), "Hello", "--temperature", "warm"]) == 2
    assert run_command(["run", str(folder), "Hello", "--colour"]) == 2


def test_experts_of_a_dense_model(tmp_path, pipe, capsys):
    folder = save_tiny_model(tmp_path / "dense", moe=None)
    assert run_command(["run", str(folder), "Hello", "--experts"]) == 1
    assert "dense" in capsys.readouterr().err
    assert run_command(["run", str(folder), "Hello", "--stats", *GREEDY]) == 0
    assert "layer" not in capsys.readouterr().err


def test_a_history_that_cannot_be_kept_is_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with keep_history():
        pass
    assert capsys.readouterr().err.count("cannot be used") == 1


def test_help_shows_defaults_and_needs_no_torch():
    code = "import sys\nfrom tramontane.cli.main import run_command\n"
    code += "run_command(['run', '--help'])\nassert 'torch' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert "[default: 0.8]" in result.stdout
    assert "[default: 0.95]" in result.stdout


def test_program_reads_a_pipe(folder, answer):
    result = subprocess.run(
        [*PROGRAM, "run", str(folder), *GREEDY], input=b"Hello\n", capture_output=True, check=True
    )
    assert result.stdout.decode("utf-8").startswith(answer)
    assert result.stderr == b""


def test_a_prompt_too_long_for_a_name_is_a_prompt() -> None:
    """The system refuses to look for a file of more than 255 characters."""
    prompt = "once upon a time " * 40
    assert _split_arguments(prompt, None) == (None, prompt)
