"""Models into folders: Hugging Face's, which transformers 4 and 5 read, and Mistral's own.

A folder is complete or unchanged, whenever the process is killed (`atomic.py`). Values are
converted and written one tensor at a time, from a model or from another checkpoint.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

from tramontane.atomic import atomic_folder
from tramontane.checkpoint import hf, mistral
from tramontane.checkpoint.assembly import Assembly, convert_values
from tramontane.checkpoint.files.safetensors_file import write_tensors
from tramontane.checkpoint.name_table import NameTable
from tramontane.checkpoint.names import HF, MISTRAL
from tramontane.checkpoint.names import OURS as OUR_NAMES
from tramontane.checkpoint.parameters import Parameters, ParametersInMemory
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError
from tramontane.models.transformer import Transformer

GENERATION_CONFIG_FILE = "generation_config.json"
MAX_SHARD_BYTES = 5 * 10**9
_SMALL_FILES_BYTES = 2**24  # headers, JSON files and a vocabulary, estimated from above

OnTensor = Callable[[str, int], None]  # called with the name and the bytes of each tensor written


class FolderWriter(Protocol):
    """What can save itself into a folder and knows the ids around a text, as a tokenizer does."""

    @property
    def bos_id(self) -> int:
        """The id that starts a text."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends it."""
        ...

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
    """Write `model` to a Hugging Face folder in `dtype`, with its tokenizer and `extra_files`.

    A sparse model that is no Mixtral is written in our own layout (`ours.py`).
    A folder that is there is replaced, as a whole and at the end. Raises CapacityError when the
    disk does not suffice and CheckpointError when `folder` cannot be written to, or when the model
    has parameters that this layout has no names for.
    """
    state = model.state_dict()
    table = choose_table(model.config)
    expected = table.map_tensors(model.config)
    known = {part.parameter for tensor in expected.values() for part in tensor.parts}
    if nameless := sorted(set(state) - known):
        raise CheckpointError(
            f"a folder of the layout {table.title} has no names for {nameless}; merge or remove "
            "them before saving"
        )
    write_hf(
        ParametersInMemory(state),
        model.config,
        folder,
        dtype=dtype,
        tokenizer=tokenizer,
        extra_files={name: text.encode() for name, text in extra_files.items()},
        max_shard_bytes=max_shard_bytes,
        table=table,
    )


def choose_table(config: ModelConfig) -> NameTable:
    """The names in a folder of such a model: Hugging Face's, or ours if it is no Mixtral."""
    return HF if config.moe is None or config.moe.is_mixtral else OUR_NAMES


def write_hf(
    parameters: Parameters,
    config: ModelConfig,
    folder: Path | str,
    *,
    dtype: torch.dtype,
    tokenizer: FolderWriter | None = None,
    token_ids: Mapping[str, int | list[int]] | None = None,
    extra_files: Mapping[str, bytes] = {},
    max_shard_bytes: int = MAX_SHARD_BYTES,
    table: NameTable = HF,
    on_tensor: OnTensor | None = None,
) -> None:
    """Write a Hugging Face folder; see `save_model`. `extra_files` are file name -> content.

    `table` may be that of our own layout. `token_ids` are the bos_token_id and eos_token_id of
    config.json and generation_config.json; None means the tokenizer's.
    """
    if token_ids is None:
        token_ids = list_token_ids(tokenizer)
    values = config.to_hf(dtype=str(dtype).removeprefix("torch."), token_ids=token_ids)
    generation = {key: values[key] for key in ("bos_token_id", "eos_token_id")}
    files = {hf.CONFIG_FILE: values, GENERATION_CONFIG_FILE: generation}
    _write_folder(
        Assembly(table, config, parameters),
        Path(folder),
        dtype=dtype,
        stem=hf.SINGLE_FILE.removesuffix(".safetensors"),
        json_files=files,
        tokenizer=tokenizer,
        extra_files=extra_files,
        max_shard_bytes=max_shard_bytes,
        on_tensor=on_tensor,
    )


def write_mistral(
    parameters: Parameters,
    config: ModelConfig,
    folder: Path | str,
    *,
    dtype: torch.dtype,
    tokenizer: FolderWriter | None = None,
    extra_files: Mapping[str, bytes] = {},
    table: NameTable = MISTRAL,
    on_tensor: OnTensor | None = None,
) -> None:
    """Write Mistral's folder, params.json and consolidated.safetensors; errors as `save_model`.

    `table` may be that of the torrent, whose experts lie stacked.
    """
    _write_folder(
        Assembly(table, config, parameters),
        Path(folder),
        dtype=dtype,
        stem=mistral.WEIGHTS_FILE.removesuffix(".safetensors"),
        json_files={mistral.CONFIG_FILE: mistral.write_params(config)},
        tokenizer=tokenizer,
        extra_files=extra_files,
        max_shard_bytes=None,  # mistral-inference reads one file
        on_tensor=on_tensor,
    )


def list_token_ids(tokenizer: FolderWriter | None) -> dict[str, int | list[int]]:
    """Those of a tokenizer as config.json has them; none without one."""
    if tokenizer is None:
        return {}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _write_folder(
    assembly: Assembly,
    folder: Path,
    *,
    dtype: torch.dtype,
    stem: str,
    json_files: Mapping[str, Mapping[str, Any]],
    tokenizer: FolderWriter | None,
    extra_files: Mapping[str, bytes],
    max_shard_bytes: int | None,
    on_tensor: OnTensor | None,
) -> None:
    shapes, exceptions = assembly.list_shapes(), assembly.list_exceptions()
    sizes = {n: prod(s) * exceptions.get(n, dtype).itemsize for n, s in shapes.items()}
    total = sum(sizes.values())
    needed = total + sum(map(len, extra_files.values())) + _SMALL_FILES_BYTES
    with atomic_folder(folder, bytes_needed=needed) as new:
        shards = split_shards(sizes, stem=stem, max_bytes=max_shard_bytes or total)
        for name, names in shards.items():
            shard = {tensor: shapes[tensor] for tensor in names}
            _write_shard(new / name, assembly, shard, dtype=dtype, on_tensor=on_tensor)
        if len(shards) > 1:
            write_json(new / f"{stem}.safetensors.index.json", build_index(shards, total))
        for name, values in json_files.items():
            write_json(new / name, values)
        if tokenizer is not None:
            tokenizer.save(new)
        for name, content in extra_files.items():
            (new / name).write_bytes(content)


def _write_shard(
    path: Path,
    assembly: Assembly,
    shapes: Mapping[str, Sequence[int]],
    *,
    dtype: torch.dtype,
    on_tensor: OnTensor | None,
) -> None:
    exceptions = assembly.list_exceptions()

    def build(name: str) -> torch.Tensor:
        values = convert_values(assembly.build(name), exceptions.get(name, dtype), name=name)
        if on_tensor is not None:
            on_tensor(name, values.numel() * values.element_size())
        return values

    write_tensors(path, shapes, build, dtype=dtype, exceptions=exceptions)


def split_shards(sizes: Mapping[str, int], *, stem: str, max_bytes: int) -> dict[str, list[str]]:
    """File names and the tensors, of given bytes, in each: at most `max_bytes`, or one tensor."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    total = f"{len(shards):05d}"
    return {f"{stem}-{n:05d}-of-{total}.safetensors": s for n, s in enumerate(shards, start=1)}


def build_index(shards: Mapping[str, Sequence[str]], total_bytes: int) -> dict[str, Any]:
    """What model.safetensors.index.json says of several shards."""
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    return {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object, two spaces deep."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
