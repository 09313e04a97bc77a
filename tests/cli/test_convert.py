"""`tramontane convert`: every layout into every other, with tokenizer and side files."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.model_folder import VOCAB_SIZE, make_tokenizer, save_mistral_model, save_tiny_model
from tests.tiny import make_config, make_model
from tests.tokenizer import vocabularies
from tests.tokenizer.texts import TEXTS
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.writer import save_model
from tramontane.cli.main import run_command
from tramontane.engine.llm import LLM
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.vocabulary import find_chat_format, find_template, require_tokenizer
from tramontane.errors import CheckpointError
from tramontane.tokenizer.chat import ChatFormat
from tramontane.tokenizer.mistral_format import MistralFormat
from tramontane.tokenizer.sentence_piece import SentencePieceTokenizer

TEXT = "A caf\u00e9, 12 cats </s>"
TALK = [{"role": "user", "content": "Hi </s>"}, {"role": "assistant", "content": "[INST] Ho"},
        {"role": "user", "content": "<s> Bye"}]  # fmt: skip


def convert(*arguments: object) -> int:
    return run_command(["convert", *map(str, arguments)])


def save_damaged(folder: Path, value: float, *, place: str = "feed_forward.experts.w1") -> Path:
    """A model with one value of the second layer that is not as it should be."""
    model = make_model(make_config(vocab_size=VOCAB_SIZE))
    model.get_parameter(f"layers.1.{place}").data.view(-1)[700] = value
    save_model(model, folder, tokenizer=make_tokenizer(), dtype=torch.float32)
    return folder


def find_chat(path: Path) -> ChatFormat | None:
    checkpoint = open_checkpoint(path)
    return find_chat_format(checkpoint, require_tokenizer(checkpoint))


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


@pytest.mark.parametrize("given", ["bf16", "Bf16", "BF16"])
def test_types_may_be_in_small_letters(tmp_path: Path, folder: Path, given: str) -> None:
    assert convert(folder, tmp_path / "m", "--to", "hf", "--type", given) == 0
    assert load_model(tmp_path / "m").norm.weight.dtype == torch.bfloat16


def test_a_type_that_does_not_exist_is_wrong_usage(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(folder, tmp_path / "m", "--to", "hf", "--type", "F8") == 2
    assert "F32, F16, BF16, Q8_0, Q4_0" in "".join(capsys.readouterr())


@pytest.mark.parametrize("arguments", [["gguf", "Q8_0"], ["gguf", "F32"], ["hf", "BF16"],
                                       ["mistral", "F16"]], ids=" ".join)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_f21_weights_that_run_refuses_are_refused(
    tmp_path: Path, arguments: list[str], value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same words, no warning of a library, and nothing is left."""
    source, (to, stored) = save_damaged(tmp_path / "m", value), arguments
    with pytest.raises(CheckpointError, match="not finite") as refusal:
        load_model(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(source, tmp_path / "out", "--to", to, "--type", stored) == 1
    assert str(refusal.value) in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("stored", "value"), [("Q8_0", 1e7), ("Q4_0", 1e6), ("F16", 1e5), ("BF16", 3.4e38)]
)
def test_f21_values_that_a_type_cannot_hold_are_refused(
    tmp_path: Path, stored: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_damaged(tmp_path / "m", value, place="attention.wq.weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(source, tmp_path / "out", "--to", "gguf", "--type", stored) == 1
    assert "blk.1.attn_q.weight has values beyond" in capsys.readouterr().err
    assert convert(source, tmp_path / "whole", "--to", "gguf", "--type", "F32") == 0
    assert sorted(os.listdir(tmp_path)) == ["m", "whole"]


@pytest.mark.parametrize("to", ["hf", "mistral", "gguf"])
@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "2"}', '{"top_p": 7}'])
def test_f21_a_damaged_generation_config_is_refused_by_name(
    tmp_path: Path, folder: Path, to: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "generation_config.json").write_text(content)
    assert convert(folder, tmp_path / "out", "--to", to) == 1
    assert str(folder / "generation_config.json") in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["hf"]


def test_f21_a_damaged_history_is_refused_by_name(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "training.json").write_text('{"stages": [')
    assert convert(folder, tmp_path / "out", "--to", "hf") == 1
    assert str(folder / "training.json") in capsys.readouterr().err


def test_what_a_gguf_has_no_place_for_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = '{"temperature": 0.5, "max_new_tokens": 7, "eos_token_id": 2}'
    source = save_tiny_model(tmp_path / "m", generation_config=values)
    (source / "training.json").write_text('{"stages": []}')
    assert convert(source, tmp_path / "m.gguf", "--to", "gguf") == 0
    expected = "not kept, as gguf has no place for it: max_tokens 7, temperature 0.5, training.json"
    assert expected in capsys.readouterr().err.splitlines()
    assert convert(source, tmp_path / "again", "--to", "hf") == 0
    assert "not kept" not in capsys.readouterr().err


def test_files_beside_a_gguf_belong_to_it_only_if_the_folder_is_named(tmp_path: Path) -> None:
    """Another model's defaults must not become those of a file that lies beside them."""
    source = save_tiny_model(tmp_path / "m")
    (tmp_path / "g").mkdir()
    assert convert(source, tmp_path / "g" / "m.gguf", "--to", "gguf") == 0
    values = '{"temperature": 0.123, "eos_token_id": 9}'
    (tmp_path / "g" / "generation_config.json").write_text(values)
    (tmp_path / "g" / "training.json").write_text("{}")
    alone, folder = LLM(tmp_path / "g" / "m.gguf"), LLM(tmp_path / "g")
    assert alone.generation_config.eos_ids == {2}
    assert alone.default_params == SamplingParams()
    assert folder.generation_config.eos_ids == {9}
    assert folder.default_params.temperature == 0.123
    for path, name in ((tmp_path / "g" / "m.gguf", "a"), (tmp_path / "g", "b")):
        assert convert(path, tmp_path / name, "--to", "hf") == 0
    assert not (tmp_path / "a" / "training.json").exists()
    assert "0.123" not in (tmp_path / "a" / "generation_config.json").read_text()
    assert (tmp_path / "b" / "generation_config.json").read_text() == values


def test_f9_a_gguf_has_a_token_for_each_row_of_the_embeddings(tmp_path: Path) -> None:
    model = make_model(make_config(vocab_size=300))
    save_model(model, tmp_path / "m", tokenizer=make_tokenizer(), dtype=torch.float32)
    out, back = tmp_path / "m.gguf", tmp_path / "back"
    assert convert(tmp_path / "m", out, "--to", "gguf") == 0
    metadata = open_checkpoint(out).contents.metadata
    tokens, types = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    assert len(tokens) == len(types) == 300
    assert tokens[VOCAB_SIZE:] == [f"[PAD{i}]" for i in range(VOCAB_SIZE, 300)]
    assert set(types[VOCAB_SIZE:]) == {5}
    assert 5 not in types[:VOCAB_SIZE]
    assert convert(out, back, "--to", "hf") == 0
    assert (back / "model.safetensors").read_bytes() == (
        tmp_path / "m" / "model.safetensors"
    ).read_bytes()
    params = SamplingParams(temperature=5, seed=0, max_tokens=50)
    expected = LLM(tmp_path / "m").generate("Hi", params).token_ids
    for path in (out, back):
        llm = LLM(path)
        assert llm.config.vocab_size == 300
        assert llm.tokenizer.to_json() == make_tokenizer().to_json()
        assert llm.generate("Hi", params).token_ids == expected


@pytest.mark.parametrize("to", ["hf", "mistral", "gguf"])
def test_f9_a_tokenizer_beyond_the_rows_is_refused(
    tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(make_model(), tmp_path / "small", tokenizer=make_tokenizer())
    assert convert(tmp_path / "small", tmp_path / "out", "--to", to) == 1
    message = "the tokenizer has 259 tokens, but the model 128; they do not belong together"
    assert f"{tmp_path / 'small'}: {message}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["small"]


@pytest.mark.parametrize(
    ("version", "way"),
    [(1, ["gguf", "hf"]), (2, ["hf", "mistral"]), (3, ["gguf", "mistral", "gguf"])],
)
def test_f10_the_version_of_mistrals_format_goes_along(
    tmp_path: Path, version: int, way: list[str]
) -> None:
    """The name of the file, or a key of the GGUF; the same ids of a conversation."""
    name = f"tokenizer.model.v{version}"
    path = save_mistral_model(tmp_path / "m", vocabularies.FILES[version], name)
    expected = MistralFormat(version).encode(TALK, require_tokenizer(open_checkpoint(path)))
    for number, to in enumerate(way):
        out = tmp_path / f"{number}{'.gguf' * (to == 'gguf')}"
        assert convert(path, out, "--to", to) == 0
        path, checkpoint = out, open_checkpoint(out)
        tokenizer = require_tokenizer(checkpoint)
        chat = find_chat_format(checkpoint, tokenizer)
        assert isinstance(chat, MistralFormat)
        assert chat.version == version
        assert chat.encode(TALK, tokenizer) == expected
        if to != "gguf":
            assert (out / name).is_file()
            assert not (out / "tokenizer.model").exists()


def test_f10_a_version_that_cannot_be_kept_is_said(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder's vocabulary is its tokenizer.json; only a file's name beside it has a version."""
    shutil.copy(vocabularies.V1_FILE, folder / "tokenizer.model.v1")
    assert convert(folder, tmp_path / "m", "--to", "mistral") == 0
    assert "not kept, as mistral has no place for it: Mistral's chat format v1" in (
        capsys.readouterr().err
    )
    assert convert(folder, tmp_path / "m.gguf", "--to", "gguf") == 0
    assert isinstance(find_chat(tmp_path / "m.gguf"), MistralFormat)


def test_f8_a_vocabulary_of_pieces_is_read_by_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AutoTokenizer needs no protobuf; our own ids still come from SentencePiece's code."""
    source = save_mistral_model(tmp_path / "m", vocabularies.V1_FILE, "tokenizer.model")
    assert convert(source, tmp_path / "m.gguf", "--to", "gguf") == 0
    for path, name in ((source, "a"), (tmp_path / "m.gguf", "b")):
        assert convert(path, tmp_path / name, "--to", "hf") == 0
        theirs: Any = AutoTokenizer.from_pretrained(tmp_path / name)
        ours = require_tokenizer(open_checkpoint(tmp_path / name))
        assert isinstance(ours, SentencePieceTokenizer)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
        for text in [*TEXTS, " a", "  b ", "[INST] What's 5 + 5? [/INST]"]:
            assert theirs(text).input_ids == ours.encode(text, bos=True)
            assert ours.encode(text) == vocabularies.oracle().encode(text)
