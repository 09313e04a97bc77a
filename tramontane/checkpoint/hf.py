"""The Hugging Face folder: config.json, and model.safetensors or shards with an index."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tramontane.checkpoint.files.json_file import read_json
from tramontane.checkpoint.files.stored_tensor import DTYPES, StoredTensor
from tramontane.checkpoint.layout import Contents, Layout
from tramontane.checkpoint.names import HF, HF_FUSED
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
_CONTEXT = "max_position_embeddings"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_LISTED = 50


def read_hf_config(folder: Path) -> ModelConfig:
    """The configuration in `config.json`. Raises CheckpointError (unreadable) or ConfigError."""
    path = folder / CONFIG_FILE
    try:
        return ModelConfig.from_hf(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def list_assumed(values: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the configuration these `values` of config.json leave open."""
    if values.get(_CONTEXT) is not None:
        return ()
    return (f"a context of {ModelConfig.max_seq_len:,} tokens ({_CONTEXT})",)


def find_dtype(values: Mapping[str, Any]) -> torch.dtype:
    """That which config.json says the weights have; bfloat16 where it says nothing we know."""
    name = values.get("dtype", values.get("torch_dtype"))
    return {str(dtype): dtype for dtype in DTYPES.values()}.get(f"torch.{name}", torch.bfloat16)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index; files have to lie in the same folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; incomplete download?")
    for name, shard in weight_map.items():
        is_plain = isinstance(shard, str) and shard == Path(shard).name
        if not is_plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {name} is said to be in {shard!r}, which is not the name of a "
                ".safetensors file in the same folder"
            )
    if missing := sorted({s for s in weight_map.values() if not (path.parent / s).is_file()}):
        raise CheckpointError(
            f"{path.parent}: missing shards {_show(missing)}; incomplete download?"
        )
    return weight_map


def check_index(
    weight_map: Mapping[str, str], tables: Mapping[str, Mapping[str, StoredTensor]], path: Path
) -> None:
    """Each shard has to hold exactly the tensors that the index places there."""
    for shard, table in tables.items():
        listed = {name for name, where in weight_map.items() if where == shard}
        if absent := sorted(listed - set(table)):
            raise CheckpointError(
                f"{path} places {_show(absent)} in {shard}, which does not have them"
            )
        if extra := sorted(set(table) - listed):
            raise CheckpointError(
                f"{shard} has tensors that {path} does not place there: {_show(extra)}"
            )


def _show(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return f"{names[:_MAX_LISTED]}{more}"


def _read_config(contents: Contents) -> ModelConfig:
    return read_hf_config(contents.folder)


def _list_assumed(contents: Contents) -> tuple[str, ...]:
    return list_assumed(read_json(contents.folder / CONFIG_FILE))


HUGGING_FACE = Layout(
    name="hf",
    containers=("safetensors", "torch"),
    tables=(HF, HF_FUSED),
    config_file=CONFIG_FILE,
    read_config=_read_config,
    list_assumed=_list_assumed,
)
