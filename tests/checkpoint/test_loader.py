"""Every tensor is accounted for (C08), configuration and tensors agree (C32), values are finite."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.checkpoint.layouts import list_tensors, save_torrent
from tests.tiny import make_config, make_model
from tramontane.checkpoint.files.torch_file import read_torch_table
from tramontane.checkpoint.loader import load_config, load_model
from tramontane.checkpoint.names import HF, TORRENT
from tramontane.checkpoint.writer import save_model
from tramontane.errors import CheckpointError, ConfigError

_ROOT = Path(__file__).parents[2]
_Tensors = dict[str, torch.Tensor]
_MEASURE_LOADING = """
import resource, sys
import torch
from tramontane.checkpoint.loader import load_model
torch.ones(1000, 1000).aminmax()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[1])
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""
_GATE = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model in fp32."""
    save_model(make_model(), tmp_path / "m", dtype=torch.float32)
    return tmp_path / "m"


def _edit_tensors(folder: Path, edit: Callable[[_Tensors], Any]) -> None:
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def _run_program(program: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, env=environment, cwd=_ROOT, capture_output=True, text=True, check=True
    ).stdout


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_weights_keep_their_dtype_unless_another_is_asked_for(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path / "m")
    assert {p.dtype for p in load_model(tmp_path / "m").parameters()} == {torch.bfloat16}
    loaded = load_model(tmp_path / "m", dtype=torch.float32)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16().float()), name


def test_loaded_model_can_be_trained_and_the_file_stays(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    assert not model.training
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_loading_takes_the_memory_of_the_model_once(tmp_path: Path) -> None:
    """Neither pages of the file nor experts before they are stacked stay beside the model."""
    config = make_config(vocab_size=100_000, n_layers=1, hidden_dim=8192)  # 49 + 48 MiB in fp32
    save_model(make_model(config), tmp_path / "m", dtype=torch.float32, max_shard_bytes=30_000_000)
    size = sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    growth = int(_run_program(_MEASURE_LOADING, str(tmp_path / "m")))
    assert size > 90 * 2**20
    assert growth <= size + 12 * 2**20


def test_c08_each_missing_tensor_is_named(folder: Path) -> None:
    """C08: each tensor in turn; exactly its name is listed."""
    original = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    assert original.keys() == HF.map_tensors(make_config()).keys()
    for name in original:
        _edit_tensors(folder, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(CheckpointError, match="incomplete download") as error:
            load_model(folder)
        assert f"1 missing tensors: {name}" in str(error.value)
        assert str(folder) in str(error.value)
        safetensors.torch.save_file(original, folder / "model.safetensors")


def test_c08_many_missing_and_unexpected_tensors_are_listed(folder: Path) -> None:
    def edit(tensors: _Tensors) -> None:
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)

    _edit_tensors(folder, edit)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert "2 missing tensors: model.norm.weight, lm_head.weight (tie_word_embed" in str(
        error.value
    )
    assert "1 unexpected tensors: model.layers.0.self_attn.q_proj.bias" in str(error.value)


# What config.json is changed to, and what the error has to say.
_DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"num_local_experts": 4}, "num_local_experts is 4, the tensors have 8"),
    "more experts": ({"num_local_experts": 10**9}, "num_local_experts is 1000000000, the tensors"),
    "layers": ({"num_hidden_layers": 1}, "num_hidden_layers is 1, the tensors have 2"),
    "more layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, the tensors"),
    "vocabulary": (
        {"vocab_size": 100},
        "vocab_size is 100 in the configuration, 128 in the tensor",
    ),
    "dim": ({"hidden_size": 32, "head_dim": 16}, "hidden_size is 32 in the configuration, 64 in"),
    "hidden": ({"intermediate_size": 64}, "intermediate_size is 64 in the configuration, 96 in"),
    "heads": (
        {"num_attention_heads": 8},
        "num_attention_heads * head_dim is 128 in the configuration, 64 in the tensor",
    ),
    "kv heads": (
        {"num_key_value_heads": 4},
        "num_key_value_heads * head_dim is 64 in the configuration, 32 in the tensor",
    ),
    "head_dim": (
        {"head_dim": 32},
        "num_attention_heads * head_dim is 128 in the configuration, 64",
    ),
}


@pytest.mark.parametrize(("changes", "said"), _DISAGREEMENTS.values(), ids=_DISAGREEMENTS.keys())
def test_c32_disagreement_names_the_field_and_both_values(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    """C32: configuration against tensors."""
    _edit_config(folder, **changes)
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert said in str(error.value)


def test_c32_experts_of_a_fused_checkpoint_are_counted_too(folder: Path) -> None:
    def fuse(tensors: _Tensors) -> None:
        for layer in range(2):
            prefix = f"model.layers.{layer}.block_sparse_moe."
            fused = f"model.layers.{layer}.mlp."
            w1, w2, w3 = (
                torch.stack([tensors.pop(f"{prefix}experts.{e}.{w}.weight") for e in range(8)])
                for w in ("w1", "w2", "w3")
            )
            tensors[f"{fused}gate.weight"] = tensors.pop(f"{prefix}gate.weight")
            tensors[f"{fused}experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
            tensors[f"{fused}experts.down_proj"] = w2

    _edit_tensors(folder, fuse)
    load_model(folder)
    _edit_config(folder, num_local_experts=4)
    with pytest.raises(CheckpointError, match="num_local_experts is 4, the tensors have 8"):
        load_model(folder)


def test_c32_kind_of_model(tmp_path: Path) -> None:
    for name, moe, other in (("a", {}, None), ("b", {"moe": None}, make_config().moe)):
        save_model(make_model(make_config(**moe)), tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(make_config(moe=other).to_hf()))
        with pytest.raises(CheckpointError, match=r"config.json describes .*, the tensors are "):
            load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9, but there are only 8 experts"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": -4}, "sliding_window is -4"),
        ({"num_key_value_heads": 3}, "n_heads is 4, not a multiple of n_kv_heads, 3"),
        ({"auto_map": {"AutoModel": "canary.Model"}}, "auto_map"),
    ],
)
def test_c32_impossible_configuration_names_file_field_and_value(
    folder: Path, changes: dict[str, Any], said: str
) -> None:
    """C32: top_k > experts, and a sliding window that is none."""
    _edit_config(folder, **changes)
    for load in (load_config, load_model):
        with pytest.raises(ConfigError) as error:
            load(folder)
        assert f"{folder / 'config.json'}: " in str(error.value)
        assert said in str(error.value)


def test_wrong_shape_names_the_tensor(folder: Path) -> None:
    _edit_tensors(folder, lambda t: t.update({_GATE: torch.ones(8, 32)}))
    with pytest.raises(CheckpointError, match=rf"{_GATE} has shape \[8, 32\], expected \[8, 64\]"):
        load_model(folder)
    _edit_tensors(folder, lambda t: t.update({_GATE: torch.ones(8)}))
    with pytest.raises(CheckpointError, match=rf"{_GATE} has shape \[8\], expected \[8, 64\]"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite_are_found(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    name = "model.layers.1.block_sparse_moe.experts.7.w2.weight"
    save_model(make_model(), tmp_path, dtype=dtype)
    _edit_tensors(tmp_path, lambda tensors: tensors[name][5, 50].fill_(value))
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        load_model(tmp_path)
    load_model(tmp_path, check_finite=False)


def test_not_finite_embeddings_of_a_tied_model_can_be_looked_at(tmp_path: Path) -> None:
    save_model(make_model(make_config(tie_embeddings=True)), tmp_path)
    name = "model.embed_tokens.weight"
    _edit_tensors(tmp_path, lambda tensors: tensors[name][3, 4].fill_(float("nan")))
    assert load_model(tmp_path, check_finite=False).output.weight[3, 4].isnan()


def test_a_value_beyond_the_dtype_asked_for_is_found(folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: tensors[_GATE][0, 0].fill_(1e6))
    load_model(folder)
    with pytest.raises(CheckpointError, match=f"{_GATE} has values .* not finite in torch.float16"):
        load_model(folder, dtype=torch.float16)


def test_of_several_dtypes_that_of_most_values_is_taken_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A router in fp32 beside bf16, as some train it, runs without a word from the user."""

    def edit(tensors: _Tensors) -> None:
        for name in tensors:
            if "gate" not in name:
                tensors[name] = tensors[name].bfloat16()

    _edit_tensors(folder, edit)
    model = load_model(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    (said,) = caplog.messages
    assert "gate.weight is torch.float32" in said
    assert "all become torch.bfloat16, which most values have" in said
    assert load_model(folder, dtype=torch.float32).output.weight.dtype == torch.float32
    assert len(caplog.messages) == 1, "with a dtype of the user's own there is nothing to say"


@pytest.mark.parametrize("window", [4096, 16])
@pytest.mark.parametrize("is_dense", [False, True])
def test_c32_a_mixtral_with_a_window_is_doubted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, window: int, is_dense: bool
) -> None:
    """C32: early hub files had 4096 by mistake; a Mistral 7B has one by right."""
    changes: dict[str, Any] = {"moe": None} if is_dense else {}
    config = make_config(sliding_window=window, max_seq_len=32768, **changes)
    save_model(make_model(config), tmp_path / "m")
    assert load_model(tmp_path / "m").config.sliding_window == window
    if is_dense:
        assert caplog.messages == []
        return
    (said,) = caplog.messages
    assert f"{tmp_path / 'm' / 'config.json'}: sliding_window is {window:,}" in said
    assert "of a context of 32,768" in said
    assert "make it null" in said


def test_c32_a_window_as_long_as_the_context_is_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(make_model(make_config(sliding_window=256)), tmp_path / "m")
    load_model(tmp_path / "m")
    assert caplog.messages == []


def test_c08_missing_layers_are_spelled_out(folder: Path) -> None:
    """C08: whole layers that are not there, by the names of their tensors."""
    config = make_config(n_layers=3)
    (folder / "config.json").write_text(json.dumps(config.to_hf(dtype="float32")))
    expected = [name for name in HF.map_tensors(config) if name.startswith("model.layers.2.")]
    with pytest.raises(CheckpointError, match=r"incomplete download") as error:
        load_model(folder)
    assert f"{folder / 'config.json'}: num_hidden_layers is 3, the tensors have 2" in str(
        error.value
    )
    assert f"{len(expected)} missing tensors: {', '.join(expected)};" in str(error.value)
    _edit_config(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match=r"more than 100,000 missing tensors, the first") as e:
        load_model(folder)
    assert len(str(e.value)) < 5000
    _edit_config(folder, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"31 unexpected tensors: model\.layers\.1\."):
        load_model(folder)


def test_c08_a_missing_file_of_numbered_ones_is_named(tmp_path: Path) -> None:
    """C08: the torrent's files lie beside one another without an index."""
    model = make_model(make_config(n_layers=4))
    folder, path = save_torrent(model, tmp_path / "m"), tmp_path / "m" / "params.json"
    absent = folder / "consolidated.03.pt"
    names = sorted(read_torch_table(absent))
    absent.unlink()
    with pytest.raises(CheckpointError, match=r"incomplete download") as error:
        load_model(folder)
    assert all(name in str(error.value) for name in names)
    assert f"{len(names)} missing tensors" in str(error.value)
    assert "missing files, by the numbers of the others: consolidated.03.pt" in str(error.value)
    for other in folder.glob("*.pt"):
        other.unlink()
    for layer in (1, 3):  # a whole one is lost, so that the number of layers is another
        kept = {n: t for n, t in list_tensors(model, TORRENT).items() if f"layers.{layer}" not in n}
        torch.save(kept, absent)
        with pytest.raises(CheckpointError, match=r"n_layers is 4, the tensors have") as error:
            load_model(folder)
        assert str(path) in str(error.value)
        assert f"layers.{layer}.attention.wq.weight" in str(error.value)
        assert "consolidated.00.pt, consolidated.01.pt, consolidated.02.pt" in str(error.value)
