"""Logits equal those of transformers after every way through the disk; and the folder's index.

transformers is the oracle: a swapped or transposed matrix cannot hide behind our own name map.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from tests.oracles.hf import compute_hf_logits, to_hf_model
from tests.tiny import make_config, make_model, make_tokens
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.writer import save_model
from tramontane.errors import CheckpointError
from tramontane.models.transformer import Transformer

_BOUND = 1e-5  # on logits of order one, fp32
_KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "mistral": {"moe": None},
    "mixtral tied": {"tie_embeddings": True},
    "mistral tied": {"moe": None, "tie_embeddings": True},
    "mixtral window": {"sliding_window": 5},
    "mistral window": {"moe": None, "sliding_window": 5},
}
_INDEX = "model.safetensors.index.json"
kinds = pytest.mark.parametrize("changes", _KINDS.values(), ids=_KINDS.keys())


@torch.no_grad()
def _compute_logits(model: Transformer) -> torch.Tensor:
    tokens = make_tokens(24)
    return model.compute_logits(model.forward_packed(tokens, [len(tokens)]).hidden)


@torch.no_grad()
def _compute_logits_in_transformers(folder: Path) -> torch.Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return compute_hf_logits(model.eval(), make_tokens(24))


@kinds
@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
def test_transformers_loads_what_we_save(
    tmp_path: Path, changes: dict[str, Any], max_shard_bytes: int
) -> None:
    model = make_model(make_config(**changes))
    save_model(model, tmp_path, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    difference = _compute_logits_in_transformers(tmp_path) - _compute_logits(model)
    assert difference.abs().max() <= _BOUND


@kinds
@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "per expert"])
def test_we_load_what_transformers_saves(
    tmp_path: Path, changes: dict[str, Any], is_fused: bool
) -> None:
    model = make_model(make_config(**changes))
    hf_model = to_hf_model(model)
    hf_model.save_pretrained(tmp_path, save_original_format=not is_fused, max_shard_size="100KB")
    names = json.loads((tmp_path / _INDEX).read_text())["weight_map"]
    if model.config.moe:
        assert any("gate_up_proj" in name for name in names) == is_fused
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    with torch.no_grad():
        expected = compute_hf_logits(hf_model, make_tokens(24))
    assert (_compute_logits(loaded) - expected).abs().max() <= _BOUND


@pytest.mark.parametrize("pair", [("w1", "w3"), ("q_proj", "o_proj"), ("experts.0", "experts.1")])
def test_the_oracle_sees_tensors_that_are_swapped(tmp_path: Path, pair: tuple[str, str]) -> None:
    """Equal shapes let such a fault pass every check of names; the logits show it."""
    model = make_model()
    save_model(model, tmp_path, dtype=torch.float32)
    path, first, second = tmp_path / "model.safetensors", *pair
    tensors = safetensors.torch.load(path.read_bytes())
    swapped = {
        name.replace(first, "?").replace(second, first).replace("?", second): tensor
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(swapped, path, metadata={"format": "pt"})
    expected = _compute_logits(model)
    difference = _compute_logits_in_transformers(tmp_path) - _compute_logits(load_model(tmp_path))
    assert difference.abs().max() <= _BOUND, "we read the swapped file as transformers does"
    assert (_compute_logits(load_model(tmp_path)) - expected).abs().max() > 0.01


def test_head_that_is_stored_although_tied_must_be_the_embeddings(tmp_path: Path) -> None:
    model = make_model(make_config(tie_embeddings=True))
    save_model(model, tmp_path, dtype=torch.float32)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, path)
    assert torch.equal(_compute_logits(load_model(tmp_path)), _compute_logits(model))
    tensors["lm_head.weight"][3, 5] += 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs .* tie_word_embeddings"):
        load_model(tmp_path)


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path, dtype=torch.float32)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    safetensors.torch.save_file(tensors, path)
    assert torch.equal(_compute_logits(load_model(tmp_path)), _compute_logits(model))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with three shards or more."""
    save_model(make_model(), tmp_path / "m", dtype=torch.float32, max_shard_bytes=200_000)
    return tmp_path / "m"


def _edit_index(folder: Path, **changes: str | None) -> None:
    """Say another file for the tensors named (with _ for a dot), or drop them."""
    index = json.loads((folder / _INDEX).read_text())
    index["weight_map"] |= {name.replace("__", "."): shard for name, shard in changes.items()}
    kept = {name: shard for name, shard in index["weight_map"].items() if shard is not None}
    (folder / _INDEX).write_text(json.dumps(index | {"weight_map": kept}))


def test_c08_missing_shards_are_listed(sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    for name in shards[1:3]:
        (sharded / name).unlink()
    with pytest.raises(CheckpointError, match=r"missing shards .* incomplete download") as error:
        load_model(sharded)
    assert all((name in str(error.value)) == (name in shards[1:3]) for name in shards)


@pytest.mark.parametrize("short_by", [1, 4096, None])
def test_c08_short_shard_is_named(sharded: Path, short_by: int | None) -> None:
    """C08: a shard short by one byte, by a page, by half of it."""
    path = sorted(sharded.glob("*.safetensors"))[1]
    size = path.stat().st_size
    short_by = short_by or size // 2
    with path.open("r+b") as file:
        file.truncate(size - short_by)
    with pytest.raises(CheckpointError, match=f"{path}: .* bytes are missing; incomplete download"):
        load_model(sharded)


def test_index_that_disagrees_is_refused(sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    _edit_index(sharded, model__norm__weight=shards[-1])
    with pytest.raises(CheckpointError, match=r"does not place there: \['model.norm.weight'\]"):
        load_model(sharded)
    _edit_index(sharded, model__norm__weight=shards[0], no__such__tensor=shards[0])
    with pytest.raises(CheckpointError, match=rf"\['no.such.tensor'\] in {shards[0]}, which does"):
        load_model(sharded)
    _edit_index(sharded, model__norm__weight=None, no__such__tensor=None)
    with pytest.raises(CheckpointError, match=r"does not place there: \['model.norm.weight'\]"):
        load_model(sharded)


@pytest.mark.parametrize(
    "shard", ["../m.safetensors", "/etc/passwd", "weights.bin", "a/b.safetensors"]
)
def test_index_may_only_name_files_of_its_folder(sharded: Path, shard: str) -> None:
    _edit_index(sharded, lm_head__weight=shard)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is said to be in"):
        load_model(sharded)


def test_two_checkpoints_in_one_folder_are_refused(sharded: Path) -> None:
    save_model(make_model(), sharded.with_name("other"), dtype=torch.float32)
    shutil.copy(sharded.with_name("other") / "model.safetensors", sharded)
    with pytest.raises(CheckpointError, match=r"2 checkpoints .*index\.json, model\.safetensors"):
        load_model(sharded)
