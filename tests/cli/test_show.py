"""`tramontane show`, and what `estimate` takes as it does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.checkpoint.layouts import LAYOUTS, save_hf, save_hf_sharded, save_mistral
from tests.model_folder import save_tiny_model
from tests.tiny import make_config, make_model
from tramontane.checkpoint.assembly import Assembly
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.names import TORRENT
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.cli.main import run_command
from tramontane.config import get_preset

Captured = pytest.CaptureFixture[str]


def show(model: object, capsys: Captured, *, code: int = 0) -> dict[str, Any]:
    assert run_command(["show", str(model), "--json"]) == code
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_a_preset(capsys: Captured) -> None:
    values = show("mixtral-8x7b", capsys)
    assert (values["parameters"], values["active_parameters"]) == (46_702_792_704, 12_879_925_248)
    assert run_command(["show", "mixtral-8x7b"]) == 0
    assert "46,702,792,704" in capsys.readouterr().out


@pytest.mark.parametrize("save", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout(tmp_path: Path, save: Any, capsys: Captured) -> None:
    config = make_config()
    path = save(make_model(config), tmp_path / "m")
    values = show(path, capsys)
    assert values["parameters"] == config.count_parameters().total
    assert values["config"]["moe"] == {"num_experts": 8, "num_experts_per_tok": 2}
    assert values["bytes_by_encoding"] == {"F32": 4 * values["parameters"]}
    assert values["found"]["configuration"] in ("config.json", "params.json", "the metadata")


@pytest.mark.parametrize("save", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("kind", ["json", "text"])
def test_a_bare_listing_tells_the_architecture(
    tmp_path: Path, save: Any, kind: str, capsys: Captured
) -> None:
    """S-38: names and shapes alone, in every layout."""
    config = make_config(n_heads=8, n_kv_heads=4)
    stored = open_checkpoint(save(make_model(config), tmp_path / "m")).contents.stored
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    listing = tmp_path / ("listing.json" if kind == "json" else "listing.txt")
    lines = [f"{name:<60} {shape} BF16" for name, shape in shapes.items()]
    listing.write_text(json.dumps(shapes) if kind == "json" else "\n".join(lines))
    values = show(listing, capsys)
    expected = config.to_dict()
    for field in ("dim", "n_layers", "hidden_dim", "vocab_size", "moe", "tie_embeddings"):
        assert values["config"][field] == expected[field], field
    assert values["parameters"] == config.count_parameters().total
    assert any("head_dim" in what for what in values["assumed"])


def test_a_real_listing_of_mixtral(tmp_path: Path, capsys: Captured) -> None:
    """The tweet that introduced the model is a list of shapes: heads of 128 are assumed right."""
    preset = get_preset("mixtral-8x7b")
    shapes = Assembly(TORRENT, preset, ParametersInMemory({})).list_shapes()
    (tmp_path / "l.json").write_text(json.dumps(shapes))
    values = show(tmp_path / "l.json", capsys)
    assert values["active_parameters"] == 12_879_925_248
    assert (values["config"]["n_heads"], values["config"]["n_kv_heads"]) == (32, 8)


def test_what_keeps_a_model_from_loading_is_said(tmp_path: Path, capsys: Captured) -> None:
    folder = save_tiny_model(tmp_path / "m")
    (folder / "config.json").unlink()
    assert run_command(["show", str(folder)]) == 1
    captured = capsys.readouterr()
    assert "has no config.json" in captured.err
    assert "n_layers             2" in captured.out


@pytest.mark.parametrize("content", ["hello world", '{"a": "b"}', '{"a": [2, 3]}', "x [3]"])
def test_a_listing_of_something_else(tmp_path: Path, content: str, capsys: Captured) -> None:
    (tmp_path / "l.txt").write_text(content)
    assert run_command(["show", str(tmp_path / "l.txt")]) == 1
    assert "tramontane: error: " in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["show", "estimate"])
def test_a_path_wins_over_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, capsys: Captured
) -> None:
    """As for `run`: the folder is what the user made."""
    save_tiny_model(tmp_path / "mixtral-8x7b")
    monkeypatch.chdir(tmp_path)
    assert run_command([verb, "mixtral-8x7b", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    size = {"show": values.get("weight_bytes"), "estimate": values.get("weights")}[verb]
    assert size == 4 * make_config(vocab_size=259).count_parameters().total


def test_the_index_that_is_named_chooses_among_two(tmp_path: Path, capsys: Captured) -> None:
    """What the message about two checkpoints in a folder says to do."""
    folder = save_hf_sharded(make_model(), tmp_path / "m")
    save_hf(make_model(), tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(folder / "model.safetensors")
    assert run_command(["show", str(folder)]) == 1
    assert "2 checkpoints (model.safetensors.index.json, model.safetensors)" in (
        capsys.readouterr().err
    )
    for name in ("model.safetensors.index.json", "model.safetensors"):
        for verb in ("show", "estimate"):
            assert run_command([verb, str(folder / name)]) == 0, (verb, name)
    capsys.readouterr()
    values = show(folder / "model.safetensors.index.json", capsys)
    assert "files, model-00001-of-" in values["found"]["weights"]


@pytest.mark.parametrize("save", [save_hf, save_mistral])
def test_a_configuration_alone(tmp_path: Path, save: Any, capsys: Captured) -> None:
    """In a folder, or named itself under whatever name."""
    folder = save(make_model(), tmp_path / "m")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (file,) = (f for f in folder.iterdir() if f.name in ("config.json", "params.json"))
    shutil.copy(file, tmp_path / "renamed.json")
    for path in (folder, file, tmp_path / "renamed.json"):
        values = show(path, capsys)
        assert values["layout"] == "a configuration, no weights"
        assert values["parameters"] == make_config().count_parameters().total
        assert run_command(["estimate", str(path), "--json"]) == 0
        capsys.readouterr()
        if path == file:
            assert values["found"] == {"configuration": file.name}
            assert values["dtype"] == ("float32" if save is save_hf else "bfloat16")


def test_a_folder_with_neither_weights_nor_configuration(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert run_command(["show", str(tmp_path)]) == 1
    assert "has no weights: looked for safetensors" in capsys.readouterr().err


def test_what_a_listing_lacks_is_said(tmp_path: Path, capsys: Captured) -> None:
    shapes = Assembly(TORRENT, make_config(), ParametersInMemory({})).list_shapes()
    lines = [f"{name} torch.Size({list(shape)})" for name, shape in shapes.items()]
    (tmp_path / "l").write_text("\n".join(lines[:-1]))
    assert run_command(["show", str(tmp_path / "l")]) == 1
    captured = capsys.readouterr()
    assert f"error: 1 missing tensors: {list(shapes)[-1]}" in captured.err
    assert "n_layers             2" in captured.out


def test_weights_without_configuration_and_a_router_without_shape(
    tmp_path: Path, capsys: Captured
) -> None:
    folder = save_mistral(make_model(), tmp_path / "m")
    (folder / "params.json").unlink()
    tensors = safetensors.torch.load((folder / "consolidated.safetensors").read_bytes())
    tensors["layers.0.feed_forward.gate.weight"] = torch.tensor(1.0)
    safetensors.torch.save_file(tensors, folder / "consolidated.safetensors")
    assert run_command(["show", str(folder)]) == 1
    assert "gate.weight has shape []; 2 dimensions belong there" in capsys.readouterr().err


def test_a_window_that_is_likely_wrong_is_shown(tmp_path: Path, capsys: Captured) -> None:
    folder = save_tiny_model(tmp_path / "m", sliding_window=16)
    assert run_command(["show", str(folder)]) == 0
    assert "doubtful" in (out := capsys.readouterr().out)
    assert "sliding_window is 16" in out


@pytest.mark.parametrize("verb", ["show", "estimate"])
@pytest.mark.parametrize("name", ["x" * 300, "a/" + "b" * 300, "mixtral-8x8b", "no/such/path"])
def test_names_of_nothing_end_in_one_line(verb: str, name: str, capsys: Captured) -> None:
    assert run_command([verb, name]) == 1
    assert capsys.readouterr().err.startswith("tramontane: error: ")


@pytest.mark.parametrize("verb", ["show", "estimate"])
@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("m/config.json", "open"),
        ("m/config.json", "stat"),
        ("m/config.json", "iterdir"),
        ("l.txt", "open"),
        ("l.txt", "stat"),
    ],
)
def test_what_may_not_be_read_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, name: str, refused: str,
    capsys: Captured,
) -> None:  # fmt: skip
    """Root may read everything, so a system that refuses is played."""
    save_tiny_model(tmp_path / "m")
    (tmp_path / "l.txt").write_text("norm.weight [64]")
    path = tmp_path / name
    real = getattr(Path, refused)

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self in (path, path.parent):
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, refused, refuse)
    assert run_command([verb, str(path.parent if name.startswith("m") else path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tramontane: error: ")
    assert "Permission denied" in error
