"""transformers' MistralForCausalLM and MixtralForCausalLM with our weights, and ours with theirs.

The name map is written here a second time on purpose: an oracle that used `checkpoint/names.py`
would share its mistakes. Names are those of transformers 5 in memory (experts stacked).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from tramontane.config import ModelConfig
from tramontane.models.transformer import Transformer, build_model

_OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SHARED = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
}
_DENSE = {
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_SPARSE = {
    "feed_forward.gate.weight": "mlp.gate.weight",
    "feed_forward.experts.w2": "mlp.experts.down_proj",
}
_W1, _W3 = "feed_forward.experts.w1", "feed_forward.experts.w3"
_GATE_UP = "mlp.experts.gate_up_proj"  # w1 above w3: (E, 2F, D)


def to_hf_model(model: Transformer) -> PreTrainedModel:
    """transformers' model with copies of our weights, in evaluation mode and of the same dtype."""
    hf_model = _build_hf_model(model.config).to(model.norm.weight.dtype)
    hf_model.load_state_dict(to_hf_tensors(model.state_dict(), model.config))
    return hf_model.eval()


def from_hf_model(hf_model: PreTrainedModel) -> Transformer:
    """Our model with copies of transformers' weights, in evaluation mode and of the same dtype."""
    config = ModelConfig.from_hf(hf_model.config.to_dict())
    model = build_model(config).to(hf_model.dtype)
    model.load_state_dict(from_hf_tensors(hf_model.state_dict(), config))
    return model.eval()


def to_hf_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors (weights or gradients by parameter name) under transformers' names."""
    renamed = {
        theirs: tensors[ours] for ours, theirs in _pair_names(config).items() if ours in tensors
    }
    for prefix, hf_prefix in _layer_prefixes(config) if config.moe else ():
        halves = (tensors[prefix + _W1], tensors[prefix + _W3])
        renamed[hf_prefix + _GATE_UP] = torch.cat(halves, dim=1)
    return renamed


def from_hf_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf_tensors`."""
    renamed = {
        ours: tensors[theirs] for ours, theirs in _pair_names(config).items() if theirs in tensors
    }
    for prefix, hf_prefix in _layer_prefixes(config) if config.moe else ():
        w1, w3 = tensors[hf_prefix + _GATE_UP].chunk(2, dim=1)
        renamed |= {prefix + _W1: w1, prefix + _W3: w3}
    return renamed


def compute_hf_logits(hf_model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits (T, V) of one sequence (T,)."""
    return hf_model(input_ids=tokens[None], use_cache=False).logits[0]


def collect_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradient of each parameter by its name; a parameter without one is an error."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name] = parameter.grad
    return gradients


def _build_hf_model(config: ModelConfig) -> PreTrainedModel:
    shape = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_seq_len,
        "attn_implementation": "eager",
    }
    if config.moe is None:
        return MistralForCausalLM(MistralConfig(**shape))
    experts = {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.num_experts_per_tok,
        "experts_implementation": "eager",
    }
    return MixtralForCausalLM(MixtralConfig(**shape, **experts))


def _pair_names(config: ModelConfig) -> dict[str, str]:
    inner = _SHARED | (_SPARSE if config.moe else _DENSE)
    pairs = dict(_OUTER)
    for prefix, hf_prefix in _layer_prefixes(config):
        pairs |= {prefix + ours: hf_prefix + theirs for ours, theirs in inner.items()}
    return pairs


def _layer_prefixes(config: ModelConfig) -> list[tuple[str, str]]:
    return [(f"layers.{i}.", f"model.layers.{i}.") for i in range(config.n_layers)]
