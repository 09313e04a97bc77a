import re
import subprocess
import sys

import pytest

from tramontane.cli.main import run_command
from tramontane.cli.serve import _name_model

KEY = "a-key-0123456789abcdef"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--host", "example.org"], "bind 127.0.0.1"),
        (["--api-key", "two words"], "an API key is empty, or has a space"),
        (["--port", "70000"], "--port is 70000"),
        (["--rate-limit", "0"], "--rate-limit is 0"),
        (["--shutdown-timeout=-1"], "--shutdown-timeout is -1"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--hang-seconds", "0"], "hang_seconds is 0"),
        (["--max-pass-seconds", "nan"], "max_pass_seconds is nan"),
        (["--api-key-file", "nowhere/keys"], "nowhere/keys: No such file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_loaded(capsys, arguments, message):
    """A02"""
    assert run_command(["serve", "no/model", *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "loading" not in err


def test_a_file_of_keys_needs_a_key(tmp_path, capsys):
    (tmp_path / "keys").write_text("# none yet\n")
    assert run_command(["serve", "--api-key-file", str(tmp_path / "keys")]) == 1
    assert "holds no key" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(capsys):
    assert run_command(["serve", "--safe-prompt", "sometimes"]) == 2
    assert run_command(["serve", "--reload"]) == 2


def test_a_model_that_is_not_there_ends_the_server(tmp_path, capsys, monkeypatch):
    """Keys come from the environment too, and are never said."""
    monkeypatch.setenv("TRAMONTANE_API_KEY", KEY)
    assert run_command(["serve", str(tmp_path / "absent"), "--port", "0"]) == 1
    err = capsys.readouterr().err
    assert re.search(r"listening    http://127\.0\.0\.1:\d+", err)
    assert "API keys: 1" in err
    assert "error: " in err
    assert KEY not in err


def test_names_of_models(tmp_path):
    assert _name_model(None) == "tramontane"
    assert _name_model("org/name") == "org/name"
    (tmp_path / "fox.gguf").touch()
    assert _name_model(str(tmp_path / "fox.gguf")) == "fox"
    assert _name_model(str(tmp_path)) == tmp_path.name


def test_help_needs_neither_torch_nor_the_server():
    code = "import sys\nfrom tramontane.cli.main import run_command\n"
    code += "run_command(['serve', '--help'])\n"
    code += "assert not {'torch', 'fastapi', 'uvicorn'} & set(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    for flag in ("--api-key-file", "--safe-prompt", "--max-num-seqs", "--price-per-hour"):
        assert flag in result.stdout
