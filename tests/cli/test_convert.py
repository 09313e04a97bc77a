"""`tramontane convert`: every layout into every other, with tokenizer and side files."""

from pathlib import Path

import pytest
import torch

from tests.model_folder import make_tokenizer, save_tiny_model
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.cli.main import run_command
from tramontane.engine.llm import LLM
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.vocabulary import find_chat_format, find_template, require_tokenizer

TEXT = "A caf\u00e9, 12 cats </s>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "hf", generation_config='{"temperature": 0.5}')


@pytest.mark.parametrize(("to", "name"), [("mistral", "m"), ("gguf", "m.gguf"), ("hf", "copy")])
def test_there_and_back(tmp_path: Path, folder: Path, to: str, name: str) -> None:
    """The same weights, the same ids, and the answers too."""
    out, back = tmp_path / name, tmp_path / "back"
    assert run_command(["convert", str(folder), str(out), "--to", to]) == 0
    assert run_command(["convert", str(out), str(back), "--to", "hf"]) == 0
    assert (back / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert open_checkpoint(out).layout.name == to
    for path in (out, back):
        tokenizer = require_tokenizer(open_checkpoint(path))
        assert tokenizer.encode(TEXT, bos=True) == make_tokenizer().encode(TEXT, bos=True)
    params = SamplingParams(max_tokens=8, temperature=0.0)
    assert LLM(out).generate("Once", params).text == LLM(folder).generate("Once", params).text
    if to != "gguf":
        assert (out / "generation_config.json").read_text() == '{"temperature": 0.5}'


@pytest.mark.parametrize("encoding", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_types(tmp_path: Path, folder: Path, encoding: str) -> None:
    out = tmp_path / "m.gguf"
    arguments = ["convert", str(folder), str(out), "--to", "gguf", "--type", encoding]
    assert run_command(arguments) == 0
    name = "layers.0.feed_forward.experts.w1"
    found = load_model(out, dtype=torch.float32).state_dict()[name]
    expected = load_model(folder).state_dict()[name]
    assert (found - expected).norm() / expected.norm() < 0.12
    assert open_checkpoint(out).contents.stored["blk.0.ffn_gate_exps.weight"].encoding == encoding


def test_bad_requests_leave_nothing(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        ([folder, out, "--to", "hf", "--type", "Q8_0"], "--type Q8_0 is for --to gguf"),
        ([folder, folder, "--to", "mistral"], "exists already"),
        ([tmp_path / "nowhere", out, "--to", "hf"], "does not exist"),
    ):
        assert run_command(["convert", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_a_model_without_a_tokenizer_is_converted_with_a_note(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokenizer.json").unlink()
    assert run_command(["convert", str(folder), str(tmp_path / "m"), "--to", "mistral"]) == 0
    assert "has no tokenizer" in capsys.readouterr().err
    load_model(tmp_path / "m")


def test_the_chat_template_goes_along(tmp_path: Path, folder: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    path = folder
    for to, name in (("gguf", "m.gguf"), ("mistral", "m"), ("hf", "again")):
        assert run_command(["convert", str(path), str(tmp_path / name), "--to", to]) == 0
        path = tmp_path / name
        checkpoint = open_checkpoint(path)
        assert find_template(checkpoint) == template
        chat = find_chat_format(checkpoint, require_tokenizer(checkpoint))
        assert chat is not None
        assert chat.render([{"role": "user", "content": "hi"}]) == "[user] hi\n"
