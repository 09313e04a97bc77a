"""Mistral's own folder: params.json, and consolidated.safetensors or the torrent's consolidated.NN.

github.com/mistralai/mistral-inference; the torrent is that of magnet link and tweet, December 2023.
"""

from pathlib import Path
from typing import Any

from tramontane.checkpoint.files.json_file import read_json
from tramontane.checkpoint.layout import Contents, Layout
from tramontane.checkpoint.names import MISTRAL as MISTRAL_NAMES
from tramontane.checkpoint.names import TORRENT as TORRENT_NAMES
from tramontane.config import PRESETS, ModelConfig, to_float
from tramontane.errors import ConfigError

CONFIG_FILE = "params.json"
WEIGHTS_FILE = "consolidated.safetensors"
_TIED = "tied_embeddings"  # their word for tie_embeddings
_CONTEXT = "max_position_embeddings"  # in some of them, for max_seq_len
# Keys of mistral-inference's TransformerArgs, and of later files, with the value that is built.
_NEUTRAL: dict[str, Any] = {
    "activation": "silu", "causal": True, "lora": None, "quantization": None, "use_biases": False,
    "use_qk_norm": False, "vision_encoder": None, "yarn": None,
}  # fmt: skip
_WITHOUT_EFFECT = ("max_batch_size", "torch_dtype", "dtype", "use_cache", "attn_impl")


def parse_params(values: dict[str, Any]) -> ModelConfig:
    """The configuration in the words of `params.json`. Raises ConfigError.

    What is missing there and would change the answers is not guessed; see `list_assumed`.
    """
    values = dict(values)
    if (kind := values.pop("model_type", "transformer")) != "transformer":
        raise ConfigError(f"model_type is {kind!r}; tramontane runs 'transformer' models")
    for key, neutral in _NEUTRAL.items():
        if (value := values.pop(key, neutral)) not in (neutral, None):
            raise ConfigError(f"{key} is {value!r:.80}; only {neutral!r} is built")
    for key in _WITHOUT_EFFECT:
        values.pop(key, None)
    _require(values, "norm_eps", where="it")
    if isinstance(moe := values.get("moe"), dict):
        _require(moe, "num_experts", "num_experts_per_tok", where="moe")
    if values.get("n_kv_heads") is None:
        values["n_kv_heads"] = values.get("n_heads")
    values["tie_embeddings"] = values.pop(_TIED, False)
    if values.get("rope_theta") is None:  # as mistral-inference chose before the field existed
        values["rope_theta"] = 1e6 if values.get("sliding_window") is None else 1e4
    values["rope_theta"] = to_float(values["rope_theta"], "rope_theta")
    longest = values.pop(_CONTEXT, None)
    if values.get("max_seq_len") is None:
        values["max_seq_len"] = _find_published_context(values) if longest is None else longest
    return ModelConfig.from_dict(values)


def list_assumed(values: dict[str, Any]) -> tuple[str, ...]:
    """What of the configuration these `values` of `params.json` leave open."""
    config = parse_params(values)
    assumed = []
    if values.get("rope_theta") is None:
        assumed.append(f"rope_theta {config.rope_theta:,.0f}, as mistral-inference does")
    if values.get("max_seq_len") is None and values.get(_CONTEXT) is None:
        assumed.append(f"a context of {config.max_seq_len:,} tokens (max_seq_len)")
    return tuple(assumed)


def _require(values: dict[str, Any], *keys: str, where: str) -> None:
    if absent := [key for key in keys if values.get(key) is None]:
        raise ConfigError(
            f"{where} lacks {' and '.join(absent)}, and a guess would change the answers; add what "
            "the model was trained with"
        )


def _find_published_context(values: dict[str, Any]) -> int:
    """That of the published model of this shape: 65,536 for 8x22B; or else our default."""
    shape = {key: values.get(key) for key in ("dim", "n_layers", "hidden_dim", "n_heads", "moe")}
    for preset in PRESETS.values():
        if shape.items() <= preset.to_dict().items():
            return preset.max_seq_len
    default: int = ModelConfig.max_seq_len
    return default


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


def _list_assumed(contents: Contents) -> tuple[str, ...]:
    return list_assumed(read_json(contents.folder / CONFIG_FILE))


MISTRAL = Layout(
    name="mistral",
    containers=("safetensors", "torch"),
    tables=(MISTRAL_NAMES, TORRENT_NAMES),
    config_file=CONFIG_FILE,
    read_config=_read_config,
    list_assumed=_list_assumed,
)
