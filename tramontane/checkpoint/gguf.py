"""GGUF: one file with the configuration, the vocabulary and the tensors, as llama.cpp has them.

github.com/ggml-org/ggml/blob/master/docs/gguf.md. Mistral and Mixtral are its architecture "llama".
"""

from collections.abc import Mapping
from typing import Any

from tramontane.checkpoint.files.untrusted import shorten
from tramontane.checkpoint.gguf_keys import (
    EXPERT_COUNT,
    EXPERT_USED_COUNT,
    FIELDS,
    read_keys,
    refuse_other_computations,
    require_keys,
)
from tramontane.checkpoint.layout import Contents, Formats, Layout
from tramontane.checkpoint.name_table import TensorMap
from tramontane.checkpoint.names import GGUF as GGUF_NAMES
from tramontane.checkpoint.names import GGUF_EACH
from tramontane.checkpoint.packed import FORMAT_OF_ENCODING
from tramontane.config import ModelConfig, MoeConfig, build_config, divide_heads
from tramontane.errors import ConfigError
from tramontane.quant.formats import keep_whole_stacks

ARCHITECTURE = "llama"
VOCABULARY = "tokenizer.ggml.tokens"


def parse_gguf_config(metadata: Mapping[str, Any], *, has_output: bool) -> ModelConfig:
    """The configuration in the metadata of a GGUF; without an output tensor embeddings are tied.

    Raises ConfigError on another architecture, and on a key that is missing where a guess would do
    harm, or that asks for another computation.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture != ARCHITECTURE:
        raise ConfigError(
            f"general.architecture is {shorten(architecture)}; tramontane runs {ARCHITECTURE!r}, "
            "which Mistral and Mixtral are written as"
        )
    found = read_keys(metadata, ARCHITECTURE)
    values = {ours: found[theirs] for theirs, ours in FIELDS.items() if theirs in found}
    num_experts = found.get(EXPERT_COUNT, 0)
    needed = ["attention.layer_norm_rms_epsilon", *([EXPERT_USED_COUNT] if num_experts else [])]
    require_keys(found, needed, architecture=ARCHITECTURE)
    if num_experts:
        values["moe"] = MoeConfig(num_experts, found[EXPERT_USED_COUNT])
    values["sliding_window"] = values.get("sliding_window") or None  # 0 is none
    values.setdefault("n_kv_heads", values.get("n_heads"))
    values.setdefault("rope_theta", 1e4)
    if isinstance(tokens := metadata.get(VOCABULARY), list):
        values.setdefault("vocab_size", len(tokens))
    if "head_dim" not in values:
        default = divide_heads(values.get("dim"), values.get("n_heads"))
        values["head_dim"] = found.get("rope.dimension_count", default)
    for name in ("rope_theta", "norm_eps"):
        if isinstance(values.get(name), float):  # stored in fp32: 1e-5 comes as 9.9999997e-06
            values[name] = float(f"{values[name]:.6g}")
    values["tie_embeddings"] = not has_output
    config: ModelConfig = build_config(ModelConfig, values, where="the metadata")
    refuse_other_computations(found, architecture=ARCHITECTURE, head_dim=config.head_dim)
    return config


def describe_for_gguf(config: ModelConfig) -> dict[str, Any]:
    """The metadata of `config`, under the keys of the architecture."""
    values = config.to_dict()
    keys: dict[str, Any] = {
        f"{ARCHITECTURE}.{theirs}": values[ours]
        for theirs, ours in FIELDS.items()
        if values[ours] is not None
    }
    keys[f"{ARCHITECTURE}.attention.value_length"] = config.head_dim
    keys[f"{ARCHITECTURE}.rope.dimension_count"] = config.head_dim
    if config.moe is not None:
        keys[f"{ARCHITECTURE}.{EXPERT_COUNT}"] = config.moe.num_experts
        keys[f"{ARCHITECTURE}.{EXPERT_USED_COUNT}"] = config.moe.num_experts_per_tok
    return keys


def _read_config(contents: Contents) -> ModelConfig:
    has_output = GGUF_NAMES.output in contents.stored
    try:
        return parse_gguf_config(contents.metadata, has_output=has_output)
    except ConfigError as error:
        raise ConfigError(f"{contents.path}: {error}") from None


def _list_assumed(contents: Contents) -> tuple[str, ...]:
    key = f"{ARCHITECTURE}.context_length"
    if key in contents.metadata:
        return ()
    return (f"a context of {_read_config(contents).max_seq_len:,} tokens ({key})",)


def _find_formats(tensors: TensorMap, contents: Contents) -> Formats:
    """The matrices whose blocks hold what the kernels take: whole numbers and fp16 scales."""
    encodings: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        if name in contents.stored:
            for part in tensor.parts:
                encodings.setdefault(part.parameter, set()).add(contents.stored[name].encoding)
    return keep_whole_stacks(
        {
            parameter: FORMAT_OF_ENCODING[min(found)]
            for parameter, found in encodings.items()
            if len(found) == 1 and found <= set(FORMAT_OF_ENCODING)
        }
    )


GGUF = Layout(
    name="gguf",
    containers=("gguf",),
    tables=(GGUF_NAMES, GGUF_EACH),
    config_file="the metadata",
    read_config=_read_config,
    list_assumed=_list_assumed,
    find_formats=_find_formats,
)
