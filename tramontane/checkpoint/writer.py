"""A model into a Hugging Face folder that transformers 4 and 5, and tramontane, read.

The folder is complete or unchanged, whenever the process is killed (`atomic.py`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tramontane.atomic import atomic_folder
from tramontane.checkpoint.hf import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from tramontane.checkpoint.names import ExpectedTensor, map_hf
from tramontane.checkpoint.safetensors_file import write_tensors
from tramontane.errors import CheckpointError
from tramontane.models.transformer import Transformer

GENERATION_CONFIG_FILE = "generation_config.json"
MAX_SHARD_BYTES = 5 * 10**9
_SMALL_FILES_BYTES = 2**20  # headers and JSON files, estimated from above


class FolderWriter(Protocol):
    """What can save itself into a folder, as a tokenizer does."""

    def save(self, folder: Path) -> None:
        """Write the files of this object into an existing folder."""
        ...


def save_model(
    model: Transformer,
    folder: Path | str,
    *,
    tokenizer: FolderWriter | None = None,
    dtype: torch.dtype = torch.bfloat16,
    extra_files: Mapping[str, str] = {},
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `model` to `folder` in `dtype`, with its tokenizer and `extra_files` (name -> text).

    A folder that is there is replaced, as a whole and at the end. Raises CapacityError when the
    disk does not suffice and CheckpointError when `folder` cannot be written to, or when the model
    has parameters that this layout has no names for.
    """
    tensors = _name_tensors(model)
    total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    with atomic_folder(folder, bytes_needed=total + _SMALL_FILES_BYTES) as new:
        _write_weights(new, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes)
        config = model.config.to_hf(dtype=str(dtype).removeprefix("torch."))
        _write_json(new / CONFIG_FILE, config)
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(new / GENERATION_CONFIG_FILE, generation)
        if tokenizer is not None:
            tokenizer.save(new)
        for name, text in extra_files.items():
            (new / name).write_text(text, encoding="utf-8")


def _name_tensors(model: Transformer) -> dict[str, Tensor]:
    """The tensors to store, under their foreign names; experts are views of their stack."""
    parameters = model.state_dict()
    expected = map_hf(model.config)
    known = {part.parameter for tensor in expected.values() for part in tensor.parts}
    if nameless := sorted(set(parameters) - known):
        raise CheckpointError(
            f"a Hugging Face folder has no names for {nameless}; merge or remove them before saving"
        )
    kept = {name: tensor for name, tensor in expected.items() if not tensor.is_optional}
    return {name: _extract(parameters, tensor) for name, tensor in kept.items()}


def _extract(parameters: Mapping[str, Tensor], expected: ExpectedTensor) -> Tensor:
    (part,) = expected.parts
    values = parameters[part.parameter]
    return values if part.expert is None else values[part.expert]


def _write_weights(
    folder: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """One file, or shards of at most `max_shard_bytes` of tensors (or one tensor) and an index."""
    shards = _split_shards(tensors, max_bytes=max_shard_bytes, itemsize=dtype.itemsize)
    if len(shards) == 1:
        write_tensors(folder / SINGLE_FILE, shards[0], dtype=dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard, dtype=dtype)
        weight_map |= dict.fromkeys(shard, name)
    total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split_shards(
    tensors: Mapping[str, Tensor], *, max_bytes: int, itemsize: int
) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * itemsize
        if shards[-1] and used + size > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    return shards


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
