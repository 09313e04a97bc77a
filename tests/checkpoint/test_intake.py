"""What is not a checkpoint of ours is refused by name (C30); nothing in it is run (C01, C02)."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.tiny import make_config, make_model
from tramontane.checkpoint.gguf_writer import write_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_config, load_model
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.checkpoint.writer import save_model
from tramontane.errors import CheckpointError, ConfigError

_PICKLES = ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "weights.pickle", "x.ckpt"]


class _Canary:
    """Unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model."""
    save_model(make_model(), tmp_path / "m", dtype=torch.float32)
    return tmp_path / "m"


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old pickle"])
@pytest.mark.parametrize("name", _PICKLES)
def test_c01_pickles_that_would_run_something_are_refused(
    tmp_path: Path, folder: Path, name: str, is_zip: bool
) -> None:
    """C01: alone in a folder, and named themselves; the message names the file and the remedy."""
    (folder / "model.safetensors").unlink()
    torch.save(_Canary(tmp_path / "canary"), folder / name, _use_new_zipfile_serialization=is_zip)
    for path in (folder, folder / name):
        with pytest.raises(CheckpointError, match=r"convert|get the safetensors") as error:
            load_model(path)
        assert str(folder / name) in str(error.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", _PICKLES)
def test_c01_pickled_weights_beside_safetensors_are_left_alone(
    tmp_path: Path, folder: Path, name: str
) -> None:
    torch.save(_Canary(tmp_path / "canary"), folder / name)
    load_model(folder)
    assert not (tmp_path / "canary").exists()


def test_c02_code_in_a_folder_is_never_imported(tmp_path: Path, folder: Path) -> None:
    """C02: `auto_map` of config.json is refused by name, tokenizer_config.json is not read."""
    (folder / "canary.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    code = {
        "auto_map": {"AutoModelForCausalLM": "canary.Model", "AutoTokenizer": ["canary.T", None]}
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(code))
    load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | code))
    with pytest.raises(ConfigError, match=r"auto_map.*never runs it"):
        load_model(folder)
    assert not (tmp_path / "canary").exists()


def test_c30_wrong_path_names_the_path_and_what_was_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "mixtral-8x7b-typo"
    for load in (load_config, load_model):
        with pytest.raises(CheckpointError, match=r"does not exist; looked for safetensors") as e:
            load(path)
        assert str(path) in str(e.value)


def test_c30_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights: looked for .*, found an empty folder"):
        load_model(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"looked for safetensors, .*, found \['notes.txt'\]"):
        load_model(tmp_path)


def test_c30_weights_without_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json; incomplete download\?"):
        load_model(folder)
    (folder / "config.json").write_text('{"model_type": "mix')
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON: .*line 1"):
        load_model(folder)


def test_c30_a_file_may_be_named(folder: Path) -> None:
    """Its configuration lies beside it."""
    assert load_model(folder / "model.safetensors").config == load_model(folder).config
    (folder / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"notes\.txt is none of safetensors, GGUF"):
        load_model(folder / "notes.txt")


def test_c30_the_name_of_a_file_does_not_matter(folder: Path) -> None:
    expected = load_model(folder).state_dict()
    (folder / "model.safetensors").rename(folder / "weights")
    assert all(torch.equal(v, expected[k]) for k, v in load_model(folder).state_dict().items())


def test_c30_two_layouts_in_one_folder(folder: Path) -> None:
    """C30: nothing is guessed, and naming a file chooses."""
    write_gguf(
        ParametersInMemory(make_model(seed=1).state_dict()), make_config(), folder / "m-f32.gguf",
        encoding="F32",
    )  # fmt: skip
    with pytest.raises(
        CheckpointError, match=r"2 checkpoints \(m-f32\.gguf, model\.safetensors\); name the one"
    ):
        load_model(folder)
    assert open_checkpoint(folder / "m-f32.gguf").layout.name == "gguf"
    assert open_checkpoint(folder / "model.safetensors").layout.name == "hf"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_c30_no_permission(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*Permission denied"):
        load_model(folder)


def test_c30_unreadable_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a folder; a regular file"):
        load_model(folder)


@pytest.fixture
def alarm() -> Iterator[None]:
    """What waits for ever fails after ten seconds."""
    signal.alarm(10)
    yield
    signal.alarm(0)


@pytest.mark.usefixtures("alarm")
@pytest.mark.parametrize("name", ["pipe", "model-2.safetensors", "tokenizer.json", "config.json"])
def test_c30_a_pipe_is_refused_by_name(folder: Path, name: str) -> None:
    """Named itself, or anywhere in a folder: to open it would be to wait for ever."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    for path in (folder, folder / name):
        with pytest.raises(CheckpointError, match=rf"{name} is a pipe, a socket or a device"):
            load_model(path)


@pytest.mark.usefixtures("alarm")
def test_c30_a_device_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match=r"/dev/zero is a pipe, a socket or a device"):
        open_checkpoint("/dev/zero")


def test_c30_a_name_that_no_file_can_have() -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read: .*too long"):
        open_checkpoint("x" * 300)


def test_s38_a_striped_hyena_is_called_by_its_name(tmp_path: Path) -> None:
    names = [
        "embedding_layer.weight",
        "blocks.0.filter.poles",
        "blocks.1.inner_mha_cls.Wqkv.weight",
    ]
    for prefix in ("", "backbone."):
        tensors = {f"{prefix}{name}": torch.ones(2) for name in names}
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"the tensors of a StripedHyena, which .* not"):
            open_checkpoint(tmp_path)


def test_a_killed_save_is_pointed_out(folder: Path) -> None:
    previous = folder.with_name(".m.tramontane-previous-host-1")
    shutil.move(folder, previous)
    with pytest.raises(CheckpointError, match=f"its previous version at {previous}"):
        load_model(folder)
