"""Mixtral 8x7B's exact names and shapes as sparse files: everything but the weights.

87 GB that take no room on disk: headers are read, data is not.
"""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.checkpoint.sparse_torch import write_sparse_torch
from tramontane.checkpoint.assembly import Assembly
from tramontane.checkpoint.gguf import describe_for_gguf
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.mistral import write_params
from tramontane.checkpoint.name_table import NameTable
from tramontane.checkpoint.names import GGUF, HF, MISTRAL, TORRENT
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.checkpoint.summary import summarize
from tramontane.config import get_preset
from tramontane.engine.estimate import estimate_memory

TOTAL, ACTIVE = 46_702_792_704, 12_879_925_248
CONFIG = get_preset("mixtral-8x7b")
NUM_SHARDS = {"hf": 19, "torrent": 8}
Shapes = Mapping[str, tuple[int, ...]]


def list_shapes(table: NameTable) -> Shapes:
    return Assembly(table, CONFIG, ParametersInMemory({})).list_shapes()


def split(shapes: Shapes, count: int) -> list[dict[str, tuple[int, ...]]]:
    names = list(shapes)
    return [{name: shapes[name] for name in names[start::count]} for start in range(count)]


def write_sparse_safetensors(path: Path, shapes: Shapes) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)


def save_hf(folder: Path) -> Path:
    shards = split(list_shapes(HF), NUM_SHARDS["hf"])
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_sparse_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    return folder


def save_mistral(folder: Path) -> Path:
    write_sparse_safetensors(folder / "consolidated.safetensors", list_shapes(MISTRAL))
    (folder / "params.json").write_text(json.dumps(write_params(CONFIG)))
    return folder


def save_torrent(folder: Path) -> Path:
    for number, shard in enumerate(split(list_shapes(TORRENT), NUM_SHARDS["torrent"])):
        write_sparse_torch(folder / f"consolidated.{number:02d}.pt", shard)
    (folder / "params.json").write_text(json.dumps(write_params(CONFIG)))
    return folder


def save_gguf(folder: Path) -> Path:
    path = folder / "mixtral.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in describe_for_gguf(CONFIG).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(key, value)
    kind, size = gguf.GGMLQuantizationType.BF16, 0
    for name, shape in list_shapes(GGUF).items():
        num_bytes = 2 * prod(shape)
        byte_shape = (*shape[:-1], 2 * shape[-1])
        writer.add_tensor_info(name, byte_shape, np.dtype("u1"), num_bytes, raw_dtype=kind)
        size += -(-num_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.truncate(-(-file.tell() // 32) * 32 + size)
    return path


SAVERS = {"hf": save_hf, "mistral": save_mistral, "torrent": save_torrent, "gguf": save_gguf}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS.keys())
def test_all_shards_are_walked_without_their_data(tmp_path: Path, save: Any) -> None:
    path = save(tmp_path)
    on_disk = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
    assert on_disk < 2**24, "the file system keeps no holes"
    checkpoint = open_checkpoint(path)
    assert checkpoint.config == CONFIG
    assert sum(pair.stored.end - pair.stored.begin for pair in checkpoint.pairs) == 2 * TOTAL
    summary = summarize(str(path)).to_dict()
    assert (summary["parameters"], summary["active_parameters"]) == (TOTAL, ACTIVE)
    assert summary["bytes_by_encoding"] == {"BF16": 2 * TOTAL}
    assert summary["kv_bytes_per_token"] == 131_072
    assert not summary["problems"]


def test_estimate_is_right_to_the_byte() -> None:
    parts = estimate_memory(CONFIG)
    assert parts.weights == 2 * TOTAL
    assert parts.kv_cache == 4 * 2**30  # 32,768 tokens
    assert estimate_memory(get_preset("mistral-7b")).kv_cache == 4096 * 131_072  # the window
    assert estimate_memory(CONFIG, context=1000, batch=3).kv_cache == 3 * 1000 * 131_072
