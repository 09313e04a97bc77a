"""GGUF: one file with the configuration, the vocabulary and the tensors, as llama.cpp has them.

github.com/ggml-org/ggml/blob/master/docs/gguf.md. Mistral and Mixtral are its architecture "llama".
"""

from collections.abc import Mapping
from typing import Any

from tramontane.checkpoint.layout import Contents, Layout
from tramontane.checkpoint.names import GGUF as GGUF_NAMES
from tramontane.checkpoint.names import GGUF_EACH
from tramontane.config import ModelConfig, MoeConfig, build_config, divide_heads
from tramontane.errors import ConfigError

ARCHITECTURE = "llama"
VOCABULARY = "tokenizer.ggml.tokens"
# Their key, without the architecture -> our field.
_KEYS = {
    "embedding_length": "dim",
    "block_count": "n_layers",
    "feed_forward_length": "hidden_dim",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
    "context_length": "max_seq_len",
    "vocab_size": "vocab_size",
}
_EXPERT_COUNT, _EXPERT_USED_COUNT = "expert_count", "expert_used_count"


def parse_gguf_config(metadata: Mapping[str, Any], *, has_output: bool) -> ModelConfig:
    """The configuration in the metadata of a GGUF; without an output tensor embeddings are tied.

    Raises ConfigError on another architecture, and on RoPE that is scaled.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ConfigError(
            f"general.architecture is {architecture!r}; tramontane runs {ARCHITECTURE!r}, which "
            "Mistral and Mixtral are written as"
        )
    found = {
        key.removeprefix(f"{ARCHITECTURE}."): value
        for key, value in metadata.items()
        if key.startswith(f"{ARCHITECTURE}.")
    }
    _refuse_unsupported(found)
    values = {ours: found[theirs] for theirs, ours in _KEYS.items() if theirs in found}
    values.setdefault("n_kv_heads", values.get("n_heads"))
    values.setdefault("rope_theta", 1e4)
    if "vocab_size" not in values and VOCABULARY in metadata:
        values["vocab_size"] = len(metadata[VOCABULARY])
    if "head_dim" not in values:
        default = divide_heads(values.get("dim"), values.get("n_heads"))
        values["head_dim"] = found.get("rope.dimension_count", default)
    if found.get(_EXPERT_COUNT, 0):
        values["moe"] = MoeConfig(found[_EXPERT_COUNT], found.get(_EXPERT_USED_COUNT, 2))
    for name in ("rope_theta", "norm_eps"):
        if isinstance(values.get(name), float):  # stored in fp32: 1e-5 comes as 9.9999997e-06
            values[name] = float(f"{values[name]:.6g}")
    values["tie_embeddings"] = not has_output
    config: ModelConfig = build_config(ModelConfig, values, where="the metadata")
    return config


def describe_for_gguf(config: ModelConfig) -> dict[str, Any]:
    """The metadata of `config`, under the keys of the architecture."""
    values = config.to_dict()
    keys: dict[str, Any] = {
        f"{ARCHITECTURE}.{theirs}": values[ours]
        for theirs, ours in _KEYS.items()
        if values[ours] is not None
    }
    keys[f"{ARCHITECTURE}.attention.value_length"] = config.head_dim
    keys[f"{ARCHITECTURE}.rope.dimension_count"] = config.head_dim
    if config.moe is not None:
        keys[f"{ARCHITECTURE}.{_EXPERT_COUNT}"] = config.moe.num_experts
        keys[f"{ARCHITECTURE}.{_EXPERT_USED_COUNT}"] = config.moe.num_experts_per_tok
    return keys


def _refuse_unsupported(found: Mapping[str, Any]) -> None:
    if (scaling := found.get("rope.scaling.type", "none")) != "none":
        raise ConfigError(f"rope.scaling.type is {scaling!r}; only unscaled RoPE is built")
    key_length = found.get("attention.key_length")
    for name in ("attention.value_length", "rope.dimension_count"):
        if key_length is not None and found.get(name, key_length) != key_length:
            raise ConfigError(
                f"{name} is {found[name]!r}, attention.key_length {key_length!r}; they must agree"
            )


def _read_config(contents: Contents) -> ModelConfig:
    has_output = GGUF_NAMES.output in contents.stored
    try:
        return parse_gguf_config(contents.metadata, has_output=has_output)
    except ConfigError as error:
        raise ConfigError(f"{contents.path}: {error}") from None


GGUF = Layout(
    name="gguf",
    containers=("gguf",),
    tables=(GGUF_NAMES, GGUF_EACH),
    config_file="the metadata",
    read_config=_read_config,
)
