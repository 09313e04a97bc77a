"""A sparse model on the CPU as one call of the native extension: the same bits, fewer steps.

`build_native_model` says no, and the model's own forward pass runs, where a part is not one that
the extension has: dense layers, other dtypes or devices, modules of another kind.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tramontane.engine.kv_cache import KVCache
from tramontane.kernels import native
from tramontane.kernels.dispatch import get_kernels
from tramontane.kernels.native_decoder import DecoderSizes, LayerWeights, NativeDecoder, Weight
from tramontane.models.transformer import DecoderLayer, ForwardOutput, Transformer
from tramontane.nn.experts import GroupedExperts
from tramontane.nn.linear import Linear
from tramontane.nn.moe import MoeLayer
from tramontane.nn.rope import RopeAngles, compute_rope
from tramontane.nn.router import Routing, TopKRouter
from tramontane.quant.modules import QuantizedExperts, QuantizedLinear


class NativeModel:
    """Runs batches of sequences through `model`, whose weights the extension reads in place."""

    def __init__(self, model: Transformer, layers: Sequence[LayerWeights]) -> None:
        config = model.config
        assert config.moe is not None
        self._config = config
        self._tensors = [*model.parameters(), *model.buffers()]
        self._addresses = self._list_addresses()
        self._rope = RopeAngles(torch.empty(0), torch.empty(0))
        sizes = DecoderSizes(
            config.dim, config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size,
            config.moe.num_experts_per_tok, config.sliding_window or 0,
        )  # fmt: skip
        self._decoder = NativeDecoder(
            sizes,
            layers,
            tok_embeddings=model.tok_embeddings.weight,
            norm=model.norm.weight,
            eps=config.norm_eps,
        )

    def run(
        self,
        tokens: Tensor,
        seqlens: Sequence[int],
        caches: Sequence[KVCache],
        *,
        with_routing: bool = True,
    ) -> ForwardOutput | None:
        """tokens (T,), T = sum(seqlens), one cache per sequence. None: this batch is not for it."""
        pairs = list(zip(caches, seqlens, strict=True))
        has_room = all(cache.has_room(num_tokens) for cache, num_tokens in pairs)
        has_moved = self._tensors[0].data_ptr() != self._addresses[0]  # then all the others have
        if not has_room or has_moved:
            return None
        located = [cache.locate(num_tokens) for cache, num_tokens in pairs]
        rope = self._find_rope(max(cache.num_keys for cache in located))
        results = self._decoder.run(tokens, located, *rope)
        for cache, num_tokens in pairs:
            cache.advance(num_tokens)
        if not with_routing:
            return ForwardOutput(results.hidden, ())
        routing = zip(results.weights, results.experts, results.logits, strict=True)
        return ForwardOutput(results.hidden, tuple(Routing(*layer) for layer in routing))

    def is_current(self) -> bool:
        """Whether all weights are where they were: a model that was cast or moved is another."""
        return self._list_addresses() == self._addresses

    def list_seconds(self) -> dict[str, float]:
        """Seconds that all runs have spent in each part of the model."""
        return self._decoder.list_seconds()

    def _list_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]

    def _find_rope(self, num_positions: int) -> RopeAngles:
        """The angles of at least so many positions, doubled when they do not suffice."""
        if len(self._rope.cos) < num_positions:
            positions = torch.arange(max(num_positions, 2 * len(self._rope.cos), 1024))
            self._rope = compute_rope(
                positions, head_dim=self._config.head_dim, theta=self._config.rope_theta
            )
        return self._rope


def build_native_model(model: Transformer) -> NativeModel | None:
    """The model for the extension, or None if a part of it is none of those it has."""
    if get_kernels() is not native:
        return None
    tensors = [*model.parameters(), *model.buffers()]
    if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        return None
    plain = [model.tok_embeddings.weight, model.norm.weight]
    layers = []
    for layer in model.layers:
        weights = _list_weights(layer)
        if weights is None:
            return None
        layers.append(weights)
        plain += [weights.attention_norm, weights.ffn_norm, weights.gate]
    dtypes = {tensor.dtype for tensor in plain}
    num_experts = {len(weights.gate) for weights in layers}
    if len(dtypes) != 1 or not dtypes <= set(native.TYPES) or len(num_experts) != 1:
        return None
    return NativeModel(model, layers)


def _list_weights(layer: nn.Module) -> LayerWeights | None:
    if type(layer) is not DecoderLayer:
        return None
    block = layer.feed_forward
    if type(block) is not MoeLayer or type(block.gate) is not TopKRouter:
        return None
    attention = layer.attention
    matrices = [_find_weight(m) for m in (attention.wq, attention.wk, attention.wv, attention.wo)]
    experts = block.experts
    if type(experts) is GroupedExperts:
        stacks: tuple[Weight, Weight, Weight] = (experts.w1, experts.w2, experts.w3)
    elif type(experts) is QuantizedExperts:
        stacks = (experts.w1.packed, experts.w2.packed, experts.w3.packed)
    else:
        return None
    wq, wk, wv, wo = matrices
    if wq is None or wk is None or wv is None or wo is None:
        return None
    return LayerWeights(
        layer.attention_norm.weight,
        layer.ffn_norm.weight,
        (wq, wk, wv, wo),
        block.gate.weight,
        stacks,
    )


def _find_weight(module: nn.Module) -> Weight | None:
    if type(module) is Linear and module.weight.dtype in native.TYPES:
        return module.weight
    return module.packed if type(module) is QuantizedLinear else None
