"""What the keys of a GGUF's architecture mean: a configuration of ours, or a computation we lack.

github.com/ggml-org/llama.cpp/blob/master/src/llama-arch.cpp lists them. A key that would change
what is computed has to have a value that changes nothing, and one that is not known is refused.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tramontane.checkpoint.files.untrusted import shorten
from tramontane.errors import ConfigError

EXPERT_COUNT, EXPERT_USED_COUNT = "expert_count", "expert_used_count"
# Their key, without the architecture -> our field.
FIELDS = {
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
_SIZES_OF_A_HEAD = ("attention.key_length", "attention.value_length", "rope.dimension_count")
# The values that change nothing; 0 is "not set" to llama.cpp.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", "linear"),  # linear is by the factor
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.q_lora_rank": (0,),
    "attention.kv_lora_rank": (0,),
    "attention.sliding_window_pattern": (0, 1),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "router_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_weights_norm": (True,),
    "expert_gating_func": (0, 1),  # 1 is softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0, 1),
    "moe_every_n_layers": (0, 1),
    "nextn_predict_layers": (0,),
    "rescale_every_n_layers": (0,),
    "swin_norm": (False,),
    "use_parallel_residual": (False,),
}
# What says nothing of the computation, or only where one of the keys above does.
_WITHOUT_EFFECT = frozenset(
    "attention.layer_norm_epsilon attention.temperature_length pooling_type tensor_data_layout "
    "rope.scaling.finetuned rope.scaling.original_context_length rope.scaling.yarn_attn_factor "
    "rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor".split()
)
_READ = {*FIELDS, EXPERT_COUNT, EXPERT_USED_COUNT}


def read_keys(metadata: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The values of an architecture's keys, without its name before them.

    One value for all layers may come as an array of equal ones. Raises ConfigError on other arrays,
    naming the key.
    """
    prefix = f"{architecture}."
    found = {}
    for key, value in metadata.items():
        if key.startswith(prefix):
            if isinstance(value, np.ndarray | list):
                if isinstance(value, list) or not value.size or (value != value[0]).any():
                    raise ConfigError(f"{key} has {len(value):,} values; one for all layers is")
                value = value[0].item()
            found[key.removeprefix(prefix)] = value
    return found


def require_keys(found: Mapping[str, Any], names: Collection[str], *, architecture: str) -> None:
    """Raise ConfigError if one is not there that nobody could guess without harm."""
    if absent := [f"{architecture}.{name}" for name in names if name not in found]:
        raise ConfigError(
            f"{', '.join(absent)} is missing, and a guess would change the answers: convert the "
            "model again with the present llama.cpp"
        )


def refuse_other_computations(
    found: Mapping[str, Any], *, architecture: str, head_dim: int
) -> None:
    """Raise ConfigError, naming the key, on each that changes what is computed."""
    neutral = _NEUTRAL | {
        "attention.scale": (0, float(np.float32(head_dim**-0.5))),
        "expert_feed_forward_length": (0, found.get("feed_forward_length")),
        "rope.freq_base_swa": (found.get("rope.freq_base"),),
        **dict.fromkeys(_SIZES_OF_A_HEAD, (head_dim,)),
    }
    for name, value in found.items():
        key = f"{architecture}.{name}"
        if name in neutral and value not in neutral[name]:
            allowed = " or ".join(str(shorten(other)) for other in neutral[name])
            raise ConfigError(
                f"{key} is {shorten(value)}, which changes the computation in a way that is not "
                f"built; only {allowed} is"
            )
        if name not in neutral and name not in _READ and name not in _WITHOUT_EFFECT:
            raise ConfigError(
                f"{key} is {shorten(value)}: it is not known whether that changes the computation; "
                "say what it means in an issue, or remove the key"
            )
