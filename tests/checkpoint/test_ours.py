"""Folders of models that are no Mixtral: written, read, run, quantised, and refused elsewhere."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from tests.checkpoint.test_writer import _Tokenizer
from tests.tiny import make_config, make_model, make_tokens
from tramontane.checkpoint.assembly import Assembly
from tramontane.checkpoint.gguf_writer import write_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.name_table import NameTable
from tramontane.checkpoint.names import GGUF, HF, HF_FUSED, MISTRAL, TORRENT
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.checkpoint.quantized import list_parameters
from tramontane.checkpoint.summary import summarize
from tramontane.checkpoint.writer import save_model, write_hf, write_mistral
from tramontane.cli.main import run_command
from tramontane.config import MoeConfig
from tramontane.config.moe import ROUTERS
from tramontane.engine.estimate import count_weight_bytes
from tramontane.engine.native_model import build_native_model
from tramontane.errors import CheckpointError
from tramontane.models.transformer import Transformer

CAUSAL = [name for name, options in ROUTERS.items() if not options.why_not_causal]


def make_moe(name: str, **changes: Any) -> MoeConfig:
    return MoeConfig(8, ROUTERS[name].experts_per_tok or 2, router=name, **changes)


def make_odd_model(name: str, **changes: Any) -> Transformer:
    model = make_model(make_config(moe=make_moe(name, **changes)))
    for module in model.modules():
        if hasattr(module, "expert_bias"):
            module.expert_bias.copy_(torch.linspace(-0.1234567, 0.1234567, 8))
    return model


def assert_same_model(ours: Transformer, theirs: Transformer) -> None:
    assert ours.config == theirs.config
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("name", CAUSAL)
def test_models_with_every_router_are_saved_and_loaded(tmp_path: Path, name: str) -> None:
    model = make_odd_model(name).bfloat16()
    save_model(model, tmp_path / "m", tokenizer=_Tokenizer())
    assert_same_model(load_model(tmp_path / "m"), model)
    assert open_checkpoint(tmp_path / "m").layout.name == (
        "hf" if name == "top_k" else "tramontane"
    )
    summary = summarize(str(tmp_path / "m"))
    assert summary.problems == ()
    assert summary.weight_bytes == count_weight_bytes(model.config, quant="none")
    state = model.state_dict().values()
    assert summary.weight_bytes == sum(tensor.nbytes for tensor in state)


def test_layouts_of_deepspeed_are_saved_and_loaded(tmp_path: Path) -> None:
    """S-17: residual networks, and a pyramid."""
    moe = make_moe("top_k", residual=True, layer_experts=(2, 8))
    model = make_model(make_config(moe=moe))
    save_model(model, tmp_path / "m", dtype=torch.float32)
    assert_same_model(load_model(tmp_path / "m"), model)
    shapes = list_parameters(model.config)
    assert shapes == {name: tuple(v.shape) for name, v in model.state_dict().items()}


def test_a_bias_keeps_its_precision(tmp_path: Path) -> None:
    save_model(make_odd_model("biased_top_k"), tmp_path / "m", dtype=torch.bfloat16)
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        bias = file.get_tensor("layers.0.feed_forward.gate.expert_bias")
        assert file.get_tensor("layers.0.feed_forward.gate.weight").dtype == torch.bfloat16
    assert bias.dtype == torch.float32
    assert bias[0] == torch.tensor(-0.1234567)
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    assert values["moe"] == {
        "num_experts": 8, "num_experts_per_tok": 2, "router": "biased_top_k",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["switch", "top_p", "biased_top_k"])
def test_what_is_missing_or_changed_is_named(tmp_path: Path, name: str) -> None:
    save_model(make_odd_model(name, residual=True), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"moe": values["moe"] | {"residual": False}}))
    with pytest.raises(CheckpointError, match=r"unexpected tensors: .*residual\.w1\.weight"):
        load_model(tmp_path / "m")
    path.write_text(json.dumps(values | {"moe": values["moe"] | {"router": "noisy_top_k",
                    "num_experts_per_tok": 2, "router_options": {}}}))  # fmt: skip
    with pytest.raises(CheckpointError, match=r"missing tensors: .*gate\.noise_weight"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("table", [HF, HF_FUSED, MISTRAL, TORRENT, GGUF], ids=lambda t: t.title)
@pytest.mark.parametrize(
    "moe",
    [make_moe("switch"), make_moe("top_k", residual=True), make_moe("top_k", layer_experts=(4, 8))],
)
def test_layouts_of_others_have_no_place_for_them(table: NameTable, moe: MoeConfig) -> None:
    config = make_config(moe=moe)
    with pytest.raises(CheckpointError, match=f"no Mixtral: .* the layout {table.title} has no"):
        Assembly(table, config, ParametersInMemory({})).list_shapes()


def test_writers_refuse_before_anything_is_written(tmp_path: Path) -> None:
    model = make_odd_model("top_p")
    parameters, config = ParametersInMemory(model.state_dict()), model.config
    with pytest.raises(CheckpointError, match="no Mixtral"):
        write_hf(parameters, config, tmp_path / "hf", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="no Mixtral"):
        write_mistral(parameters, config, tmp_path / "mistral", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="no Mixtral"):
        write_gguf(parameters, config, tmp_path / "f.gguf", encoding="F32")
    assert os.listdir(tmp_path) == []


def test_convert_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(make_odd_model("switch"), tmp_path / "m")
    assert run_command(["convert", str(tmp_path / "m"), str(tmp_path / "out"), "--to", "hf"]) != 0
    assert "no Mixtral: no other program runs it" in capsys.readouterr().err


def test_transformers_refuses_our_folder(tmp_path: Path) -> None:
    save_model(make_odd_model("sparse_mixer_v2"), tmp_path / "m")
    with pytest.raises(ValueError, match="tramontane"):
        AutoConfig.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("name", ["biased_top_k", "switch", "top_p"])
def test_quantised_folders_have_them_too(tmp_path: Path, name: str) -> None:
    model = make_odd_model(name, residual=True)
    save_model(model, tmp_path / "m", dtype=torch.float32)
    assert run_command(["quantize", str(tmp_path / "m"), str(tmp_path / "q"), "--bits", "8"]) == 0
    checkpoint = open_checkpoint(tmp_path / "q")
    assert checkpoint.config == model.config
    assert summarize(str(tmp_path / "q")).problems == ()
    if name == "biased_top_k":
        stored = checkpoint.contents.stored["layers.1.feed_forward.gate.expert_bias"]
        expected = model.layers[1].feed_forward.gate.expert_bias
        assert torch.equal(stored.read(), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "top_k"])
def test_a_token_is_what_it_is_whatever_follows_or_shares_its_batch(name: str) -> None:
    """Outside of training; the extension has no such router, so it leaves the model to torch."""
    model = make_odd_model(name, residual=name == "top_p")
    assert build_native_model(model) is None
    tokens = make_tokens(30)
    whole = model.forward_packed(tokens, (20, 10)).hidden
    alone = model.forward_packed(tokens[:20], (20,)).hidden
    prefix = model.forward_packed(tokens[:3], (3,)).hidden
    torch.testing.assert_close(whole[:20], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole[:3], prefix, rtol=1e-4, atol=1e-5)
