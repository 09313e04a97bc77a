"""`tramontane quantize` and `run --quant`: end to end, continued after a stop, and refused."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.layouts import save_gguf
from tests.model_folder import VOCAB_SIZE, make_tokenizer, save_tiny_model
from tests.tiny import make_config, make_model
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.writer import save_model
from tramontane.cli import quantize as verb
from tramontane.cli.main import run_command
from tramontane.engine.llm import LLM
from tramontane.engine.loading import load_for_running
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.vocabulary import require_tokenizer
from tramontane.errors import CheckpointError
from tramontane.quant.apply import quantize_model
from tramontane.quant.formats import QuantFormat, QuantRecipe

Captured = pytest.CaptureFixture[str]
GREEDY = ["--temperature", "0", "--max-tokens", "8"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in bf16 with a tokenizer and sampling defaults."""
    model = make_model(make_config(vocab_size=VOCAB_SIZE))
    extra = {"generation_config.json": '{"temperature": 0.5}', "training.json": "{}"}
    save_model(model, tmp_path / "m", tokenizer=make_tokenizer(), extra_files=extra)
    return tmp_path / "m"


def quantize(source: Path, out: Path, *arguments: str) -> int:
    return run_command(["quantize", str(source), str(out), *arguments])


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        (["--bits", "4"], QuantRecipe.from_format(QuantFormat(4))),
        (["--bits", "8", "--head"], QuantRecipe.from_format(QuantFormat(8), head=True)),
        (["--bits=4", "--asymmetric"], QuantRecipe.from_format(QuantFormat(4, 32, False))),
    ],
)
def test_what_is_written_is_what_would_be_rounded_on_load(
    tmp_path: Path, folder: Path, arguments: list[str], recipe: QuantRecipe, capsys: Captured
) -> None:
    out = tmp_path / "q"
    assert quantize(folder, out, *arguments) == 0
    err = capsys.readouterr().err
    expected = load_model(folder)
    quantize_model(expected, recipe)
    state = load_for_running(open_checkpoint(out)).state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(value, state[n]) for n, value in expected.state_dict().items())
    before, after = (sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in (folder, out))
    assert f"{before:,} bytes -> {after:,} bytes" in err
    assert "bits per weight" in err
    assert "relative error of a matrix 0.0" in err
    assert f"wrote {out}; tramontane run {out}" in err
    assert require_tokenizer(open_checkpoint(out)).encode("A cat") == make_tokenizer().encode(
        "A cat"
    )
    assert (out / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert (out / "training.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "q"]


def test_groups_of_128(tmp_path: Path, capsys: Captured) -> None:
    wide = save_tiny_model(tmp_path / "m", dim=128, hidden_dim=128, n_heads=8)
    assert quantize(wide, tmp_path / "q", "--bits", "4", "--group", "128") == 0
    config = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert config["experts"] == {"bits": 4, "group_size": 128, "symmetric": True}
    assert config["head"] is None


@pytest.mark.parametrize("encoding", ["F16", "Q4_0"])
def test_a_gguf_may_be_the_source(tmp_path: Path, encoding: str) -> None:
    """Q4_0 becomes int4 without a further loss; what is not packed stays in fp16."""
    model = make_model(make_config(vocab_size=VOCAB_SIZE))
    path = save_gguf(model, tmp_path / "m", encoding=encoding)
    assert quantize(path, tmp_path / "q", "--bits", "4") == 0
    loaded = load_for_running(open_checkpoint(tmp_path / "q")).state_dict()
    expected = load_for_running(open_checkpoint(path), quant="int4").state_dict()
    dtype = torch.float16 if encoding == "F16" else torch.bfloat16
    assert loaded["norm.weight"].dtype == dtype  # norms are fp32 in a GGUF
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_run_answers_alike(tmp_path: Path, folder: Path, capsys: Captured) -> None:
    assert quantize(folder, tmp_path / "q", "--bits", "4") == 0
    answers = []
    for arguments in ([str(tmp_path / "q")], [str(folder), "--quant", "int4"]):
        capsys.readouterr()
        assert run_command(["run", *arguments, "Once upon", *GREEDY]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    params = SamplingParams(temperature=0, max_tokens=8)
    assert LLM(tmp_path / "q").generate("Once upon", params).text == answers[0].removesuffix("\n")


def test_run_refuses_to_round_twice(tmp_path: Path, folder: Path, capsys: Captured) -> None:
    assert quantize(folder, tmp_path / "q", "--bits", "8") == 0
    assert run_command(["run", str(tmp_path / "q"), "x", "--quant", "int4", *GREEDY]) == 1
    assert "is quantised already" in capsys.readouterr().err
    assert run_command(["run", str(folder), "x", "--quant", "int3", *GREEDY]) == 2


@pytest.mark.parametrize("arguments", [["--bits", "8"], ["--bits", "8", "--head"]])
def test_perplexity_and_show(
    tmp_path: Path, folder: Path, arguments: list[str], capsys: Captured
) -> None:
    """8 bits cost little, and a quantised head is scored as it runs."""
    assert quantize(folder, tmp_path / "q", *arguments) == 0
    text = tmp_path / "t.jsonl"
    text.write_text(json.dumps({"text": "The cat sat on the mat. " * 9, "split": "valid"}) + "\n")
    means = []
    for path in (folder, tmp_path / "q"):
        capsys.readouterr()
        assert run_command(["perplexity", str(path), "--source", str(text), "--json"]) == 0
        means.append(json.loads(capsys.readouterr().out)["mean"])
    assert means[0] != means[1]
    assert means[1] == pytest.approx(means[0], rel=0.02)
    assert run_command(["show", str(tmp_path / "q"), "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert values["layout"] == "tramontane, quantised"
    assert set(values["bytes_by_encoding"]) == {"int8-g32", "BF16"}
    stored = open_checkpoint(tmp_path / "q").contents.stored.values()
    num_bytes = sum(tensor.end - tensor.begin for tensor in stored)
    assert sum(values["bytes_by_encoding"].values()) == num_bytes
    assert values["bits_per_weight"] == pytest.approx(8 * num_bytes / values["parameters"])
    assert run_command(["show", str(tmp_path / "q")]) == 0
    assert "bits per weight      " in capsys.readouterr().out
    assert run_command(["estimate", str(tmp_path / "q"), "--ram", "1"]) == 0


def test_show_says_what_keeps_a_folder_from_loading(
    tmp_path: Path, folder: Path, capsys: Captured
) -> None:
    assert quantize(folder, tmp_path / "q", "--bits", "4") == 0
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"]["attention"] = None
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    assert run_command(["show", str(tmp_path / "q")]) == 1
    captured = capsys.readouterr()
    assert "missing tensors: layers.0.attention.wq.weight" in captured.err
    assert "bytes in U8" in captured.out


def test_a_stopped_run_goes_on(
    tmp_path: Path, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = verb._write_unit, 0

    def write_unit(*arguments: Any) -> None:
        nonlocal count
        if count == 20:
            raise KeyboardInterrupt
        count += 1
        real(*arguments)

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert quantize(folder, whole, "--bits", "4") == 0
    monkeypatch.setattr(verb, "_write_unit", write_unit)
    assert quantize(folder, out, "--bits", "4") == 130
    assert "stopped with 20 of 65 parts; call again" in capsys.readouterr().err
    monkeypatch.setattr(verb, "_write_unit", real)
    assert quantize(folder, out, "--bits", "8") == 1
    assert "holds an unfinished run with quantization_config" in capsys.readouterr().err
    assert quantize(folder, out, "--bits", "4") == 0
    assert "going on: 20 of 65 parts are there" in capsys.readouterr().err
    for path in whole.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


def test_a_source_that_has_changed_is_not_gone_on_with(
    tmp_path: Path, folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(verb, "_write_unit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert quantize(folder, tmp_path / "out", "--bits", "4") == 130
    os.utime(folder / "model.safetensors", (1, 1))
    assert quantize(folder, tmp_path / "out", "--bits", "4") == 1
    assert "holds an unfinished run with files" in capsys.readouterr().err


def test_bad_requests_leave_nothing(tmp_path: Path, folder: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        ([folder, folder, "--bits", "4"], "exists already"),
        ([tmp_path / "nowhere", out, "--bits", "4"], "does not exist"),
        ([folder, out, "--bits", "4", "--group", "64"], "experts.w2: rows of 96 values"),
    ):
        assert run_command(["quantize", *map(str, arguments)]) == 1
        assert message in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
    for arguments in ([], ["--bits", "3"], ["--bits", "4", "--group", "16"]):
        assert quantize(folder, out, *arguments) == 2


def test_a_quantised_folder_is_no_source(tmp_path: Path, folder: Path, capsys: Captured) -> None:
    assert quantize(folder, tmp_path / "q", "--bits", "4") == 0
    out = tmp_path / "out"
    assert quantize(tmp_path / "q", out, "--bits", "4") == 1
    assert "quantize takes the model that it was made from" in capsys.readouterr().err
    assert run_command(["convert", str(tmp_path / "q"), str(out), "--to", "hf"]) == 1
    assert "convert takes the model that it was made from" in capsys.readouterr().err
    assert not out.exists()


def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, folder: Path, capsys: Captured
) -> None:
    model = load_model(folder)
    model.layers[1].feed_forward.experts.w2.data[7, 5, 3] = float("nan")
    save_model(model, tmp_path / "bad")
    assert quantize(tmp_path / "bad", tmp_path / "out", "--bits", "4") == 1
    assert "experts.7.w2.weight has values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_written_with_a_note(
    tmp_path: Path, folder: Path, capsys: Captured
) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert quantize(folder, tmp_path / "q", "--bits", "4") == 0
    assert "has no tokenizer" in capsys.readouterr().err
    load_for_running(open_checkpoint(tmp_path / "q"))


def test_training_does_not_begin_with_a_quantised_model(tmp_path: Path, folder: Path) -> None:
    assert quantize(folder, tmp_path / "q", "--bits", "4") == 0
    with pytest.raises(CheckpointError, match="is quantised, which is for running"):
        load_model(tmp_path / "q")


_MEASURE = """
import resource, sys
from tramontane.cli.main import run_command
assert run_command(["quantize", sys.argv[1], sys.argv[3], "--bits", "4"]) == 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert run_command(["quantize", sys.argv[2], sys.argv[4], "--bits", "4"]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_matrix_and_not_of_the_model(tmp_path: Path) -> None:
    """48 matrices of 4 MB, one after another."""
    small = save_tiny_model(tmp_path / "small", n_layers=1)
    large = save_tiny_model(tmp_path / "large", dim=512, hidden_dim=2048)
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *map(str, (small, large, tmp_path / "a", tmp_path / "b"))],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert int(done.stdout) * 1024 < 64e6, done.stdout
