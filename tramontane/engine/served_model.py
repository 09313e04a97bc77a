"""What a server tells about the model it serves."""

import time
from dataclasses import dataclass, field

from torch import nn

from tramontane.config import ModelConfig
from tramontane.models.transformer import Transformer
from tramontane.nn.moe import MoeLayer


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """Sizes and counts of parameters; without experts their counts are None, and 0 of parameters.

    `max_seq_len` is the context that is served. `weight_bytes_per_expert` is what one expert of one
    layer reads, as it is stored, `other_weight_bytes` all else. `layer_experts` are the experts of
    each layer, of which `num_experts` is the largest number; `created` is in seconds of Unix time.
    """

    name: str
    max_seq_len: int
    vocab_size: int
    n_layers: int
    dim: int
    num_experts: int | None
    num_experts_per_tok: int | None
    layer_experts: tuple[int, ...]
    num_parameters: int
    num_active_parameters: int
    num_expert_parameters: int
    weight_bytes_per_expert: int
    other_weight_bytes: int
    created: int = field(default_factory=lambda: int(time.time()))


def describe_model(
    model: Transformer, *, name: str, vocab_size: int, max_seq_len: int
) -> ServedModel:
    """The facts of a model in memory."""
    config, moe = model.config, model.config.moe
    count = config.count_parameters()
    expert_bytes = sum(
        _count_bytes(module.experts) for module in model.modules() if isinstance(module, MoeLayer)
    )
    layer_experts = moe.list_experts(config.n_layers) if moe else ()
    return ServedModel(
        name=name,
        max_seq_len=max_seq_len,
        vocab_size=vocab_size,
        n_layers=config.n_layers,
        dim=config.dim,
        num_experts=moe.num_experts if moe else None,
        num_experts_per_tok=moe.num_experts_per_tok if moe else None,
        layer_experts=layer_experts,
        num_parameters=count.total,
        num_active_parameters=count.active,
        num_expert_parameters=_count_expert_parameters(config),
        weight_bytes_per_expert=expert_bytes // max(1, sum(layer_experts)),
        other_weight_bytes=_count_bytes(model) - expert_bytes,
    )


def _count_expert_parameters(config: ModelConfig) -> int:
    return 3 * config.dim * config.hidden_dim if config.moe else 0


def _count_bytes(module: nn.Module) -> int:
    tensors = {t.data_ptr(): t for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
