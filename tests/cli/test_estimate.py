"""`tramontane estimate`: figures, the type they are counted in, and advice that holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.layouts import LAYOUTS, save_gguf
from tests.model_folder import save_tiny_model
from tests.tiny import make_config, make_model
from tramontane.checkpoint.writer import save_model
from tramontane.cli.main import run_command

Captured = pytest.CaptureFixture[str]


def estimate(model: object, capsys: Captured, *flags: str) -> dict[str, Any]:
    assert run_command(["estimate", str(model), "--json", *flags]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


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


@pytest.mark.parametrize(
    ("ram", "advice"),
    [
        ("8", "it does not fit; this takes a larger machine"),
        ("28", "it does not fit; with --quant int4 --context "),
        ("40", "it does not fit; with --quant int4 it does"),
        ("60", "it does not fit; with --quant int8 it does"),
        ("89", "it does not fit; with --context "),
        ("200", "it fits; with up to 32,768 tokens"),
    ],
)
def test_estimate_advises_what_does_fit(ram: str, advice: str, capsys: Captured) -> None:
    """Each advice is followed, and then it fits."""
    arguments = ["estimate", "mixtral-8x7b", "--ram", ram]
    assert run_command(arguments) == 0
    out = capsys.readouterr().out
    assert advice in out
    if " it does" in out:
        flags = out.rpartition("with ")[2].removesuffix(" it does\n").split()
        assert run_command([*arguments, *flags, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["fits"]


def test_estimate_of_a_context_that_the_model_lacks(capsys: Captured) -> None:
    assert run_command(["estimate", "mistral-7b", "--context", "99999", "--ram", "9"]) == 1
    assert "the model has 1 to 32,768" in capsys.readouterr().err


@pytest.mark.parametrize("ram", ["nan", "inf", "-inf", "0", "-1", "1e300"])
def test_ram_that_no_machine_has(ram: str, capsys: Captured) -> None:
    assert run_command(["estimate", "mixtral-8x7b", f"--ram={ram}"]) == 1
    assert "; it must be a number of GiB above zero" in capsys.readouterr().err


@pytest.mark.parametrize("save", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_weights_and_cache_are_counted_as_they_are_loaded(
    tmp_path: Path, save: Any, capsys: Captured
) -> None:
    """fp32 in every layout here; presets are bf16."""
    config = make_config()
    path = save(make_model(config), tmp_path / "m")
    values = estimate(path, capsys, "--context", "100")
    assert values["dtype"] == "float32"
    assert values["weights"] == 4 * config.count_parameters().total
    assert values["kv_cache"] == 100 * config.count_kv_bytes_per_token(bytes_per_value=4)
    assert run_command(["estimate", str(path)]) == 0
    assert " in fp32, 1 x 256 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "word"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
def test_two_bytes_are_two_bytes(
    tmp_path: Path, dtype: torch.dtype, word: str, capsys: Captured
) -> None:
    save_model(make_model(), tmp_path / "m", dtype=dtype)
    values = estimate(tmp_path / "m", capsys)
    assert values["weights"] == 2 * make_config().count_parameters().total
    (tmp_path / "m" / "model.safetensors").unlink()  # config.json says it too
    assert estimate(tmp_path / "m", capsys)["dtype"] == str(dtype).removeprefix("torch.")
    assert run_command(["estimate", str(tmp_path / "m")]) == 0
    assert f" in {word}, " in capsys.readouterr().out


def test_packed_weights_are_counted_packed(tmp_path: Path, capsys: Captured) -> None:
    """Those of a GGUF that run as they lie there."""
    path = save_gguf(make_model(), tmp_path / "m", encoding="Q4_0")
    values = estimate(path, capsys)
    total = make_config().count_parameters().total
    assert total / 2 < values["weights"] < 2 * total
    assert values["total"] == values["weights"] + values["kv_cache"] + values["scratch"]
    assert estimate(path, capsys, f"--ram={values['total'] / 2**30}")["fits"]
    small = estimate(path, capsys, f"--ram={(values['total'] - 1) / 2**30}")
    assert not small["fits"]
    assert 0 < small["longest_context_that_fits"] < 256


def test_the_longest_context_is_in_the_type_of_the_model(tmp_path: Path, capsys: Captured) -> None:
    folder = save_tiny_model(tmp_path / "m")
    whole = estimate(folder, capsys, "--context", "100")
    found = estimate(folder, capsys, f"--ram={whole['total'] / 2**30}")
    assert found["longest_context_that_fits"] == 100
