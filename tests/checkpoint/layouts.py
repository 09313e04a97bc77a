"""One model in every layout, as its users have them on disk."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict

from tests.oracles.hf import to_hf_model
from tramontane.checkpoint.assembly import Assembly
from tramontane.checkpoint.gguf import describe_for_gguf
from tramontane.checkpoint.gguf_writer import write_gguf
from tramontane.checkpoint.mistral import write_params
from tramontane.checkpoint.name_table import NameTable
from tramontane.checkpoint.names import GGUF, GGUF_EACH, TORRENT
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.checkpoint.writer import save_model, write_mistral
from tramontane.models.transformer import Transformer

NUM_TORRENT_SHARDS = 8


def list_tensors(model: Transformer, table: NameTable) -> dict[str, torch.Tensor]:
    """The model's tensors under the names of a table, in their foreign form."""
    assembly = Assembly(table, model.config, ParametersInMemory(model.state_dict()))
    return {name: assembly.build(name).contiguous() for name in assembly.list_shapes()}


def save_hf(model: Transformer, folder: Path) -> Path:
    save_model(model, folder, dtype=torch.float32)
    return folder


def save_hf_sharded(model: Transformer, folder: Path) -> Path:
    save_model(model, folder, dtype=torch.float32, max_shard_bytes=100_000)
    return folder


def save_hf_published(
    model: Transformer,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 10**12,
) -> Path:
    """As folders on the hub are: one expert after another, w1, w2 and w3 of each."""
    save_model(model, folder, dtype=dtype)
    written = folder / "model.safetensors"
    tensors = safetensors.torch.load(written.read_bytes())
    written.unlink()
    in_order = {name: tensors[name] for name in sorted(tensors)}
    save_torch_state_dict(in_order, folder, max_shard_size=max_shard_bytes)
    return folder


def save_hf_fused(model: Transformer, folder: Path) -> Path:
    """As transformers 5 has it in memory."""
    to_hf_model(model).save_pretrained(folder, save_original_format=False)
    return folder


def save_mistral(model: Transformer, folder: Path) -> Path:
    state = ParametersInMemory(model.state_dict())
    write_mistral(state, model.config, folder, dtype=torch.float32)
    return folder


def save_torrent(model: Transformer, folder: Path) -> Path:
    """params.json and eight consolidated.NN.pt, each with some of the tensors."""
    folder.mkdir()
    tensors = list(list_tensors(model, TORRENT).items())
    for shard in range(NUM_TORRENT_SHARDS):
        part = dict(tensors[shard::NUM_TORRENT_SHARDS])
        torch.save(part, folder / f"consolidated.{shard:02d}.pt")
    (folder / "params.json").write_text(json.dumps(write_params(model.config)))
    return folder


def save_gguf(model: Transformer, folder: Path, *, encoding: str = "F32") -> Path:
    folder.mkdir()
    state = ParametersInMemory(model.state_dict())
    write_gguf(state, model.config, folder / "model.gguf", encoding=encoding)
    return folder / "model.gguf"


def save_gguf_each(model: Transformer, folder: Path) -> Path:
    """As llama.cpp wrote before April 2024: one tensor for each expert."""
    folder.mkdir()
    _write(gguf.GGUFWriter(folder / "model.gguf", "llama"), model, GGUF_EACH)
    return folder / "model.gguf"


def save_gguf_split(
    model: Transformer, folder: Path, *, stem: str = "m", has_empty_first: bool = False
) -> Path:
    """As llama.cpp's gguf-split has it: STEM-00001-of-0000N.gguf, perhaps of metadata alone."""
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(
        folder / f"{stem}.gguf", "llama", split_max_tensors=9, small_first_shard=has_empty_first
    )
    _write(writer, model, GGUF)
    return min(folder.glob(f"{stem}-*.gguf"))


def _write(writer: gguf.GGUFWriter, model: Transformer, table: NameTable) -> None:
    for key, value in describe_for_gguf(model.config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(key, value)
    for name, tensor in list_tensors(model, table).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LAYOUTS: dict[str, Callable[[Transformer, Path], Path]] = {
    "Hugging Face": save_hf,
    "Hugging Face, sharded": save_hf_sharded,
    "Hugging Face, published": save_hf_published,
    "Hugging Face, fused experts": save_hf_fused,
    "Mistral": save_mistral,
    "torrent": save_torrent,
    "GGUF": save_gguf,
    "GGUF, split": save_gguf_split,
    "GGUF, one tensor per expert": save_gguf_each,
}
