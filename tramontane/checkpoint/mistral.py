"""Mistral's own folder: params.json, and consolidated.safetensors or the torrent's consolidated.NN.

github.com/mistralai/mistral-inference; the torrent is that of magnet link and tweet, December 2023.
"""

from pathlib import Path
from typing import Any

from tramontane.checkpoint.files.json_file import read_json
from tramontane.checkpoint.layout import Contents, Layout
from tramontane.checkpoint.names import MISTRAL as MISTRAL_NAMES
from tramontane.checkpoint.names import TORRENT as TORRENT_NAMES
from tramontane.config import ModelConfig, to_float
from tramontane.errors import ConfigError

CONFIG_FILE = "params.json"
WEIGHTS_FILE = "consolidated.safetensors"
_TIED = "tied_embeddings"  # their word for tie_embeddings


def parse_params(values: dict[str, Any]) -> ModelConfig:
    """The configuration in the words of `params.json`. Raises ConfigError."""
    values = dict(values)
    if (kind := values.pop("model_type", "transformer")) != "transformer":
        raise ConfigError(f"model_type is {kind!r}; tramontane runs 'transformer' models")
    if values.get("n_kv_heads") is None:
        values["n_kv_heads"] = values.get("n_heads")
    values["tie_embeddings"] = values.pop(_TIED, False)
    if values.get("rope_theta") is None:  # as mistral-inference chose before the field existed
        values["rope_theta"] = 1e6 if values.get("sliding_window") is None else 1e4
    values["rope_theta"] = to_float(values["rope_theta"], "rope_theta")
    return ModelConfig.from_dict(values)


def write_params(config: ModelConfig) -> dict[str, Any]:
    """The `params.json` of `config`, without the fields that say nothing."""
    values = config.to_dict()
    values[_TIED] = values.pop("tie_embeddings")
    return {key: value for key, value in values.items() if value is not None and value is not False}


def read_mistral_config(folder: Path) -> ModelConfig:
    """The configuration in `params.json`. Raises CheckpointError (unreadable) or ConfigError."""
    path = folder / CONFIG_FILE
    try:
        return parse_params(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_config(contents: Contents) -> ModelConfig:
    return read_mistral_config(contents.folder)


MISTRAL = Layout(
    name="mistral",
    containers=("safetensors", "torch"),
    tables=(MISTRAL_NAMES, TORRENT_NAMES),
    config_file=CONFIG_FILE,
    read_config=_read_config,
)
