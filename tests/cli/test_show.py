"""`tramontane show` and `tramontane estimate`."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.layouts import LAYOUTS
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


def test_estimate(capsys: Captured) -> None:
    assert run_command(["estimate", "mixtral-8x7b", "--ram", "200", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["weights"] == 2 * 46_702_792_704
    assert values["kv_cache"] == 4 * 2**30
    assert values["total"] == values["weights"] + values["kv_cache"] + values["scratch"]
    assert values["fits"]
    assert values["longest_context_that_fits"] == 32768


def test_estimate_says_what_would_fit(capsys: Captured) -> None:
    base = ["estimate", "mixtral-8x7b", "--quant", "int4", "--ram"]
    assert run_command([*base, "28"]) == 0
    assert "it does not fit; with --context " in capsys.readouterr().out
    assert run_command([*base, "8"]) == 0
    assert "this takes a larger machine" in capsys.readouterr().out
    assert run_command(["estimate", "mixtral-8x7b", "--ram", "8"]) == 0
    assert "try --quant int8 or int4" in capsys.readouterr().out


def test_estimate_of_a_context_that_the_model_lacks(capsys: Captured) -> None:
    assert run_command(["estimate", "mistral-7b", "--context", "99999", "--ram", "9"]) == 1
    assert "the model has 1 to 32,768" in capsys.readouterr().err
