"""The Hugging Face folder: config.json, and model.safetensors or shards with an index."""

from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path

from tramontane.checkpoint import names
from tramontane.checkpoint.layout import Layout
from tramontane.checkpoint.safetensors_file import parse_json, read_table
from tramontane.checkpoint.stored_tensor import StoredTensor
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def is_hf_folder(path: Path) -> bool:
    """Whether the folder has weights, or a list of weights, under the names of this layout."""
    return any((path / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def read_hf_config(folder: Path) -> ModelConfig:
    """The configuration in `config.json`. Raises CheckpointError (unreadable) or ConfigError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}; incomplete download?")
    values = parse_json(path.read_bytes(), where=str(path))
    try:
        return ModelConfig.from_hf(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find_hf_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the folder by name, from the headers of its files.

    Raises CheckpointError when a shard is missing or damaged, or disagrees with the index.
    """
    has_index, has_single = (folder / INDEX_FILE).exists(), (folder / SINGLE_FILE).exists()
    if not has_index:
        return _drop_derived(read_table(folder / SINGLE_FILE))
    weight_map = _read_index(folder / INDEX_FILE)
    shards = sorted(set(weight_map.values()))
    if has_single and SINGLE_FILE not in shards:
        raise CheckpointError(
            f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}, which does not mention it; "
            "remove the one that is not meant"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: missing shards {missing}; incomplete download?")
    tables = {shard: read_table(folder / shard) for shard in shards}
    _check_index(weight_map, tables, folder / INDEX_FILE)
    return _drop_derived(dict(chain.from_iterable(table.items() for table in tables.values())))


def check_hf_names(config: ModelConfig, stored: Collection[str]) -> None:
    """Raise CheckpointError where `config.json` speaks of another kind or number of layers."""
    num_experts = names.count_hf_experts(stored)
    if (num_experts == 0) != (config.moe is None):
        kinds = {True: "dense ('mistral')", False: "a mixture of experts ('mixtral')"}
        raise CheckpointError(
            f"{CONFIG_FILE}: model_type says {kinds[config.moe is None]}, "
            f"the tensors are {kinds[num_experts == 0]}; these files do not belong together"
        )
    asked = {"num_hidden_layers": (config.n_layers, names.count_hf_layers(stored))}
    if config.moe is not None and num_experts is not None:
        asked["num_local_experts"] = (config.moe.num_experts, num_experts)
    for field, (said, found) in asked.items():
        if said != found:
            raise CheckpointError(
                f"{CONFIG_FILE}: {field} is {said}, the tensors have {found}; "
                "incomplete download, or files that do not belong together?"
            )


def _drop_derived(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in tensors.items() if not names.is_derived(name)}


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index; files have to lie in the same folder."""
    weight_map = parse_json(path.read_bytes(), where=str(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; incomplete download?")
    for name, shard in weight_map.items():
        is_plain = isinstance(shard, str) and shard == Path(shard).name
        if not is_plain or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {name} is said to be in {shard!r}, which is not the name of a "
                ".safetensors file in the same folder"
            )
    return weight_map


def _check_index(
    weight_map: Mapping[str, str], tables: Mapping[str, Mapping[str, StoredTensor]], path: Path
) -> None:
    """Each shard has to hold exactly the tensors that the index places there."""
    for shard, table in tables.items():
        listed = {name for name, where in weight_map.items() if where == shard}
        if absent := sorted(listed - set(table)):
            raise CheckpointError(f"{path} places {absent} in {shard}, which does not have them")
        if extra := sorted(set(table) - listed):
            raise CheckpointError(f"{shard} has tensors that {path} does not place there: {extra}")


HUGGING_FACE = Layout(
    name="Hugging Face",
    looks_for=f"{SINGLE_FILE} or {INDEX_FILE}",
    is_at=is_hf_folder,
    read_config=read_hf_config,
    find_tensors=find_hf_tensors,
    check_names=check_hf_names,
    map_names=names.map_hf,
)
