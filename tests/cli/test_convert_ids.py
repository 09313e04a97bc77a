"""`tramontane convert` keeps the ids around a text, whatever they are and wherever they stand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from tests.model_folder import VOCAB_SIZE, make_tokenizer, save_tiny_model
from tests.tiny import make_config, make_model
from tramontane.checkpoint.gguf_writer import write_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.checkpoint.writer import save_model
from tramontane.cli.main import run_command
from tramontane.engine.llm import LLM
from tramontane.engine.vocabulary import find_eos_ids, require_tokenizer
from tramontane.tokenizer.gguf_vocabulary import describe_for_gguf
from tramontane.tokenizer.json_tokenizer import JsonTokenizer

BOS, EOS = VOCAB_SIZE, VOCAB_SIZE + 1  # 259 and 260, after the 259 of the toy vocabulary
WAYS = [
    ["hf"],
    ["mistral", "hf"],
    ["gguf", "hf"],
    ["gguf", "mistral", "gguf", "hf"],
]
ways = pytest.mark.parametrize("way", WAYS, ids=" ".join)


def make_other_tokenizer() -> JsonTokenizer:
    """The toy vocabulary, whose texts begin and end with tokens that were added to it."""
    backend = tokenizers.Tokenizer.from_str(make_tokenizer().to_json())
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    return JsonTokenizer(backend, names=names)


def convert(path: Path, way: Sequence[str]) -> list[Path]:
    """Over the layouts of `way`; the paths of all that was written."""
    written = []
    for number, to in enumerate(way):
        out = path.parent / f"{number}-{to}{'.gguf' * (to == 'gguf')}"
        assert run_command(["convert", str(path), str(out), "--to", to]) == 0
        written.append(out)
        path = out
    return written


def read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


@ways
def test_ids_of_the_tokenizer_go_along(tmp_path: Path, way: Sequence[str]) -> None:
    model = make_model(make_config(vocab_size=VOCAB_SIZE + 2))
    save_model(model, tmp_path / "m", tokenizer=make_other_tokenizer(), dtype=torch.float32)
    (tmp_path / "m" / "generation_config.json").unlink()
    *_, last = written = convert(tmp_path / "m", way)
    for path in written:
        llm = LLM(path)
        assert llm.generation_config.eos_ids == {EOS}
        assert (llm.tokenizer.bos_id, llm.tokenizer.eos_id) == (BOS, EOS)
        assert llm.tokenizer.bos_token == "<|begin|>"
    for name in ("config.json", "generation_config.json"):
        assert read(last / name).items() >= {"bos_token_id": BOS, "eos_token_id": EOS}.items()


@ways
def test_several_eos_ids_of_the_source_go_along(
    tmp_path: Path, way: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A GGUF tells the end of a turn from that of a text; a folder keeps the file as it is."""
    content = '{"eos_token_id": [2, 7]}'
    folder = save_tiny_model(tmp_path / "m", generation_config=content)
    *_, last = written = convert(folder, way)
    assert [LLM(path).generation_config.eos_ids for path in written] == [{2, 7}] * len(way)
    assert "not kept" not in capsys.readouterr().err
    if "gguf" not in way:
        assert (last / "generation_config.json").read_text() == content
    else:
        assert read(last / "generation_config.json")["eos_token_id"] == [2, 7]


@ways
def test_without_a_tokenizer_the_ids_of_the_configuration_go_along(
    tmp_path: Path, way: Sequence[str]
) -> None:
    folder = save_tiny_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").unlink()
    values = read(folder / "config.json") | {"bos_token_id": 0, "eos_token_id": [5, 9]}
    (folder / "config.json").write_text(json.dumps(values))
    last = convert(folder, way)[-1]
    for name in ("config.json", "generation_config.json"):
        assert read(last / name).items() >= {"bos_token_id": 0, "eos_token_id": [5, 9]}.items()


def test_ids_without_a_place_in_a_gguf_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_model(tmp_path / "m", generation_config='{"eos_token_id": [2, 7, 9, 1000]}')
    path = convert(folder, ["gguf"])[0]
    expected = "not kept, as gguf has no place for it: eos_token_id 9, eos_token_id 1000\n"
    assert expected in capsys.readouterr().err
    checkpoint = open_checkpoint(path)
    assert find_eos_ids(checkpoint, 2) == [2, 7]


def test_texts_without_bos_stay_so(tmp_path: Path) -> None:
    """A GGUF may say that its model was trained on texts without bos."""
    tokenizer, model = make_tokenizer(), make_model(make_config(vocab_size=VOCAB_SIZE))
    tokenizer.adds_bos = False
    parameters = ParametersInMemory(model.state_dict())
    metadata = describe_for_gguf(tokenizer)
    write_gguf(parameters, model.config, tmp_path / "m", encoding="F32", metadata=metadata)
    for path in convert(tmp_path / "m", ["hf", "mistral", "gguf"]):
        assert not require_tokenizer(open_checkpoint(path)).adds_bos
