"""Saving: what is written, in how many files, and what a full disk or a kill leaves (T02, T03)."""

import errno
import io
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

from tests.tiny import make_config, make_model
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.checkpoint.writer import save_model, write_hf
from tramontane.errors import CapacityError, CheckpointError
from tramontane.models.transformer import Transformer

_ROOT = Path(__file__).parents[2]


class _Tokenizer:
    bos_id, eos_id = 3, 7

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def test_folder_has_weights_configurations_tokenizer_and_extra_files(tmp_path: Path) -> None:
    extra = {"README.md": "# A card\n"}
    save_model(make_model(), tmp_path / "m", tokenizer=_Tokenizer(), extra_files=extra)
    assert sorted(os.listdir(tmp_path / "m")) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 3, "eos_token_id": 7}
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, 7)


def test_ids_without_a_tokenizer_are_those_given_or_mistrals(tmp_path: Path) -> None:
    model, ids = make_model(), {"bos_token_id": 0, "eos_token_id": [5, 6]}
    save_model(model, tmp_path / "plain")
    parameters = ParametersInMemory(model.state_dict())
    write_hf(parameters, model.config, tmp_path / "given", dtype=torch.float32, token_ids=ids)
    for name, expected in (("plain", {"bos_token_id": 1, "eos_token_id": 2}), ("given", ids)):
        assert json.loads((tmp_path / name / "generation_config.json").read_text()) == expected
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config.items() >= expected.items()


def test_file_is_plain_safetensors_with_one_tensor_per_expert(tmp_path: Path) -> None:
    model = make_model()
    save_model(model, tmp_path / "m", dtype=torch.float16)
    with safetensors.safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        expert = file.get_tensor("model.layers.1.block_sparse_moe.experts.5.w2.weight")
    assert torch.equal(expert, model.layers[1].feed_forward.experts.w2[5].half())


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    save_model(make_model(make_config(tie_embeddings=True)), tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    loaded = load_model(tmp_path / "m")
    assert loaded.output.weight is loaded.tok_embeddings.weight


def test_shards_stay_below_the_limit_and_the_index_lists_them(tmp_path: Path) -> None:
    limit = 60_000  # bytes; the largest tensor, the embeddings, has 128 * 64 * 4 = 32,768
    model = make_model()
    save_model(model, tmp_path / "m", dtype=torch.float32, max_shard_bytes=limit)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = {name: safetensors.torch.load_file(tmp_path / "m" / name)
              for name in set(index["weight_map"].values())}  # fmt: skip
    sizes = {name: sum(t.nbytes for t in shard.values()) for name, shard in shards.items()}
    assert max(sizes.values()) <= limit
    assert sum(sizes.values()) == index["metadata"]["total_size"]
    assert {t: name for name, shard in shards.items() for t in shard} == index["weight_map"]
    assert f"model-00001-of-{len(shards):05d}.safetensors" in shards
    for name, value in load_model(tmp_path / "m").state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(CheckpointError, match=r"cannot store torch\.float64; known are"):
        save_model(model, tmp_path / "m", dtype=torch.float64)
    model.layers[0].attention.register_parameter("lora", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"no names for \['layers\.0\.attention\.lora'\]"):
        save_model(model, tmp_path / "m")
    assert os.listdir(tmp_path) == []


class _FillingDisk:
    """Lets so many writes through, then the disk is full."""

    def __init__(self, writes: int) -> None:
        self.writes = writes
        self._open: Callable[..., Any] = io.open

    def open(self, *args: Any, **kwargs: Any) -> Any:
        handle = self._open(*args, **kwargs)
        write = handle.write

        def write_if_room(data: Any) -> int:
            self.writes -= 1
            if self.writes < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(data)

        if handle.writable():
            proxy = _Handle(handle)
            proxy.write = write_if_room
            return proxy
        return handle


class _Handle:
    """An open file whose `write` may be replaced, which a built-in one does not allow."""

    write: Callable[[Any], int]

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __enter__(self) -> "_Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self._handle.close()


def test_t03_disk_full_at_every_write_keeps_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T03: the error names folder and bytes needed, the old model loads, nothing else is left."""
    config = make_config(n_layers=1, moe=None)
    old, new = make_model(config), make_model(config, seed=1)
    save_model(old, tmp_path / "m", dtype=torch.float32)
    num_failures = 0
    while (message := _save_on_filling_disk(new, tmp_path / "m", num_failures, monkeypatch)) != "":
        assert f"{tmp_path / 'm'}: the disk is full" in message
        assert "bytes needed" in message
        assert torch.equal(load_model(tmp_path / "m").norm.weight, old.norm.weight)
        assert os.listdir(tmp_path) == ["m"]
        num_failures += 1
    assert num_failures > len(new.state_dict())  # each tensor, each header, each JSON file
    assert torch.equal(load_model(tmp_path / "m").norm.weight, new.norm.weight)


def _save_on_filling_disk(
    model: Transformer, folder: Path, writes: int, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The message of the CapacityError, or nothing if so many writes were enough."""
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", _FillingDisk(writes).open)
        try:
            save_model(model, folder, dtype=torch.float32, max_shard_bytes=60_000)
        except CapacityError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_t02_killed_before_any_change_a_whole_model_loads(tmp_path: Path, way: str) -> None:
    """T02: kill at every fsync, rename, unlink and open of one save; old or new loads."""
    program = Path(__file__).with_name("save_under_fire.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), way],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    seeds = [seed for seed, _, _ in found]
    assert seeds == sorted(seeds), "the new model must come at one moment and stay"
    assert seeds[0] == 0
    assert seeds[-1] == 1
    assert len(seeds) > 20
    assert max(num_left for _, num_left, _ in found) <= (1 if way == "exchange" else 2)
    assert all(names == ["model"] for _, _, names in found)
