"""The decoder's configuration, its presets, and what follows from its shape.

Fields are those of Mistral's `params.json`; `from_hf` and `to_hf` translate `config.json`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from tramontane.config.fields import build_config, divide_heads, require_positive, to_float
from tramontane.config.moe import MoeConfig, build_moe_config
from tramontane.errors import ConfigError

OUR_MODEL_TYPE = "tramontane"  # of sparse models that are no Mixtral


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model, and those that take part in the computation of one token."""

    total: int
    active: int


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a Mistral (`moe=None`, arXiv:2310.06825) or Mixtral (arXiv:2401.04088) decoder.

    `sliding_window` counts the keys a token sees, itself included; None means all. `max_seq_len` is
    the context length in tokens.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    sliding_window: int | None = None
    tie_embeddings: bool = False
    max_seq_len: int = 32768
    moe: MoeConfig | None = None

    def __post_init__(self) -> None:
        require_positive(
            self, "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads",
            "vocab_size", "norm_eps", "rope_theta", "max_seq_len",
        )  # fmt: skip
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads is {self.n_heads}, not a multiple of n_kv_heads, {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; RoPE turns pairs, so it must be even")
        if self.sliding_window is not None:
            require_positive(self, "sliding_window")
        if not isinstance(self.tie_embeddings, bool):
            raise ConfigError(
                f"tie_embeddings is {self.tie_embeddings!r}; it must be true or false"
            )
        if self.moe is not None:
            self.moe.require_causal()
            if self.moe.layer_experts and len(self.moe.layer_experts) != self.n_layers:
                raise ConfigError(
                    f"moe.layer_experts has {len(self.moe.layer_experts)} numbers for "
                    f"{self.n_layers} layers"
                )

    def count_parameters(self) -> ParameterCount:
        """Count from the shapes alone: 46,702,792,704 for Mixtral 8x7B, 12,879,925,248 active."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        expert = 3 * self.dim * self.hidden_dim
        num_experts = num_active = self.n_layers
        shared = self.n_layers * (attention + 2 * self.dim) + self.dim
        shared += self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        if self.moe is not None:
            num_experts = self.moe.count_experts(self.n_layers)
            num_active = self.moe.count_active_experts(self.n_layers)
            shared += num_experts * self.dim + self._count_extra_parameters(self.moe)
        return ParameterCount(
            total=shared + num_experts * expert, active=shared + num_active * expert
        )

    def _count_extra_parameters(self, moe: MoeConfig) -> int:
        """Those that a Mixtral does not have, of all layers."""
        sizes = {"dim": self.dim, "hidden_dim": self.hidden_dim, "2": 2}
        count = 0
        for dims in moe.list_extra_tensors()[0].values():
            per_expert = math.prod(sizes[dim] for dim in dims if dim != "num_experts")
            times = moe.count_experts(self.n_layers) if "num_experts" in dims else self.n_layers
            count += per_expert * times
        return count

    def for_layer(self, layer: int) -> "ModelConfig":
        """As if all layers had as many experts as this one."""
        if self.moe is None or not self.moe.layer_experts:
            return self
        return replace(self, moe=self.moe.for_layer(layer))

    def count_kv_bytes_per_token(self, *, bytes_per_value: int = 2) -> int:
        """Bytes that the keys and values of one token occupy over all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values; `from_dict` reads it back."""
        return asdict(self) | {"moe": None if self.moe is None else self.moe.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Build from our own names (those of `params.json`); a wrong key is a ConfigError."""
        values = dict(values)
        if values.get("moe") is not None:
            values["moe"] = build_moe_config(values["moe"])
        return build_config(cls, values, where="the model configuration")

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> "ModelConfig":
        """Build from a Hugging Face `config.json` of model_type mistral or mixtral, or from ours.

        Raises ConfigError on another model type, on a key that this family does not have, and on a
        value that would change the computation and is not implemented (another activation, scaled
        RoPE). Code references (`auto_map`) are refused: nothing from a folder is ever run.
        """
        values = dict(values)
        model_type = values.pop("model_type", None)
        if model_type not in ("mistral", "mixtral", OUR_MODEL_TYPE):
            raise ConfigError(
                f"model_type is {model_type!r}; tramontane runs 'mistral' and 'mixtral' models"
            )
        _refuse_unsupported(values)
        for key in _HF_WITHOUT_EFFECT:
            values.pop(key, None)
        theta = _pop_rope_theta(values, default=1e4 if model_type == "mistral" else 1e6)
        moe = None
        if model_type == "mixtral":
            moe = MoeConfig(
                num_experts=values.pop("num_local_experts", 8),
                num_experts_per_tok=values.pop("num_experts_per_tok", 2),
            )
        elif model_type == OUR_MODEL_TYPE:
            moe = build_moe_config(values.pop("moe", None))
        fixed = {ours: values.pop(theirs) for theirs, ours in _HF_NAMES.items() if theirs in values}
        if values:
            raise ConfigError(
                f"config.json has unknown keys for a {model_type} model: {sorted(values)}; "
                "remove them, or say what they mean in an issue"
            )
        fixed.setdefault("sliding_window", 4096 if model_type == "mistral" else None)
        fixed.setdefault("norm_eps", 1e-6 if model_type == "mistral" else 1e-5)
        if fixed.get("head_dim") is None:
            fixed["head_dim"] = divide_heads(fixed.get("dim"), fixed.get("n_heads"))
        if fixed.setdefault("n_kv_heads", 8) is None:  # as transformers: null is not "absent"
            fixed["n_kv_heads"] = fixed.get("n_heads")
        return build_config(cls, {**fixed, "rope_theta": theta, "moe": moe}, where="config.json")

    def to_hf(
        self, *, dtype: str = "bfloat16", token_ids: Mapping[str, int | list[int]] = {}
    ) -> dict[str, Any]:
        """The `config.json` that transformers (4 and 5) reads; `dtype` is that of the weights.

        `token_ids` are the vocabulary's bos_token_id and eos_token_id; what it leaves out is as
        transformers assumes it, Mistral's 1 and 2. A sparse model that is no Mixtral gets a
        model_type of ours, which transformers refuses.
        """
        values: dict[str, Any] = {theirs: getattr(self, ours) for theirs, ours in _HF_NAMES.items()}
        model_type = "mistral"
        if self.moe is not None:
            model_type = "mixtral" if self.moe.is_mixtral else OUR_MODEL_TYPE
        values |= {
            "architectures": [f"{model_type.capitalize()}ForCausalLM"],
            "model_type": model_type,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "rope_theta": self.rope_theta,
            "dtype": dtype,
            "torch_dtype": dtype,
            "use_cache": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **token_ids,
        }
        if self.moe is not None and not self.moe.is_mixtral:
            values["moe"] = self.moe.to_dict()
        elif self.moe is not None:
            values["num_local_experts"] = self.moe.num_experts
            values["num_experts_per_tok"] = self.moe.num_experts_per_tok
            values["router_aux_loss_coef"] = 0.001
            values["output_router_logits"] = False
        return dict(sorted(values.items()))


_HF_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "rms_norm_eps": "norm_eps",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
    "tie_word_embeddings": "tie_embeddings",
    "max_position_embeddings": "max_seq_len",
}
# Keys that describe the file, its training or its generation defaults, not the computation.
_HF_WITHOUT_EFFECT = frozenset(
    "architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id "
    "id2label initializer_range is_encoder_decoder label2id output_attentions "
    "output_hidden_states output_router_logits pad_token_id problem_type return_dict "
    "router_aux_loss_coef router_jitter_noise torch_dtype transformers_version use_cache "
    "_name_or_path unk_token_id attn_implementation".split()
)


def _refuse_unsupported(values: dict[str, Any]) -> None:
    if "auto_map" in values:
        raise ConfigError("config.json names code to import (auto_map); tramontane never runs it")
    if values.pop("hidden_act", "silu") not in ("silu", "swish"):
        raise ConfigError("config.json asks for another hidden_act than 'silu'")
    if values.pop("quantization_config", None) is not None:
        raise ConfigError("config.json has a quantization_config; load the unquantised weights")
    for key in ("attention_bias", "mlp_bias"):
        if values.pop(key, False):
            raise ConfigError(f"config.json sets {key}; this family has no biases")


def _pop_rope_theta(values: dict[str, Any], *, default: float) -> float:
    """Read theta in its old place (`rope_theta`) or that of transformers 5 (`rope_parameters`)."""
    rope = values.pop("rope_parameters", None) or {}
    scaling = values.pop("rope_scaling", None) or {}
    for name, block in (("rope_parameters", rope), ("rope_scaling", scaling)):
        if not isinstance(block, dict):
            raise ConfigError(f"config.json: {name} is {block!r}; it must be an object")
        rope_type = block.get("rope_type", block.get("type", "default"))
        if rope_type != "default":
            raise ConfigError(f"config.json asks for {rope_type!r} RoPE; only 'default' is built")
    theta = values.pop("rope_theta", None) or rope.get("rope_theta") or default
    return to_float(theta, "rope_theta")


PRESETS: dict[str, ModelConfig] = {
    "mixtral-8x7b": ModelConfig(
        dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8,
        vocab_size=32000, rope_theta=1e6, max_seq_len=32768, moe=MoeConfig(),
    ),
    "mixtral-8x22b": ModelConfig(
        dim=6144, n_layers=56, head_dim=128, hidden_dim=16384, n_heads=48, n_kv_heads=8,
        vocab_size=32000, rope_theta=1e6, max_seq_len=65536, moe=MoeConfig(),
    ),
    "mistral-7b": ModelConfig(
        dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8,
        vocab_size=32000, rope_theta=1e4, sliding_window=4096, max_seq_len=32768,
    ),
    # The size of the bundled model: 23M parameters, of which 9M work on each token.
    "tramontane-23m": ModelConfig(
        dim=256, n_layers=6, head_dim=64, hidden_dim=512, n_heads=4, n_kv_heads=2,
        vocab_size=6144, rope_theta=1e4, max_seq_len=1024, moe=MoeConfig(),
    ),
    # Its dense equal in active parameters: one network as wide as the two experts of a token.
    "tramontane-9m-dense": ModelConfig(
        dim=256, n_layers=6, head_dim=64, hidden_dim=1024, n_heads=4, n_kv_heads=2,
        vocab_size=6144, rope_theta=1e4, max_seq_len=1024,
    ),
}  # fmt: skip


def get_preset(name: str, **changes: Any) -> ModelConfig:
    """A preset by its name, with single fields changed."""
    if name not in PRESETS:
        raise ConfigError(f"no preset named {name!r}; there are {sorted(PRESETS)}")
    return replace(PRESETS[name], **changes)
