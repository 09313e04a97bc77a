"""A whole decoder of sparse layers in one call of the extension (csrc/decoder.h).

At a few tens of microseconds per token the calls between kernels would cost more than they do.
Shapes: T tokens, D dim, H heads, G kv heads, S head_dim, L layers, E experts, K experts per token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tramontane.kernels.native import TYPES, _native, describe
from tramontane.kernels.packing import PackedWeight

Weight = Tensor | PackedWeight


class LayerWeights(NamedTuple):
    """Of one layer: norms (D,), attention, the router's gate (E, D), stacks of experts."""

    attention_norm: Tensor
    ffn_norm: Tensor
    attention: tuple[Weight, Weight, Weight, Weight]  # wq, wk, wv, wo
    gate: Tensor
    experts: tuple[Weight, Weight, Weight]  # w1, w2, w3


class DecoderSizes(NamedTuple):
    """What the weights alone do not tell; `window` 0 means none."""

    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts_per_tok: int
    window: int


class SequenceCache(NamedTuple):
    """Where one sequence keeps its keys and values, in the order that the extension reads.

    `keys` is the address of the first layer's; values lie `values_offset` bytes further, each next
    layer `layer_offset`. A block holds (G, block_size, S); `blocks` is the address of int64 block
    numbers, or 0 if there is one block.
    """

    num_queries: int
    num_keys: int  # the new ones included
    keys: int
    values_offset: int
    layer_offset: int
    type: int
    block_size: int
    blocks: int


class DecoderResults(NamedTuple):
    """hidden (T, D) after the last norm; weights (L, T, K), experts (L, T, K), logits (L, T, E)."""

    hidden: Tensor
    weights: Tensor
    experts: Tensor
    logits: Tensor


class NativeDecoder:
    """The weights of a decoder, known to the extension by address: it must not outlive them.

    The norms, the gate and the embeddings (V, D) have the dtype of the activations.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        layers: Sequence[LayerWeights],
        *,
        tok_embeddings: Tensor,
        norm: Tensor,
        eps: float,
    ) -> None:
        self._sizes, self._dtype = sizes, tok_embeddings.dtype
        self._num_layers, self._num_experts = len(layers), len(layers[0].gate)
        kind = TYPES[self._dtype]
        self._decoder = _native.Decoder(
            tuple(sizes), eps, kind, tok_embeddings.data_ptr(), norm.data_ptr()
        )
        for layer in layers:
            self._decoder.add_layer(
                kind,
                layer.attention_norm.data_ptr(),
                layer.ffn_norm.data_ptr(),
                tuple(describe(weight) for weight in layer.attention),
                layer.gate.data_ptr(),
                tuple(describe(weight) for weight in layer.experts),
                len(layer.gate),
            )

    def run(
        self, tokens: Tensor, caches: list[SequenceCache], cos: Tensor, sin: Tensor
    ) -> DecoderResults:
        """Tokens (T,) int64 of the sequences one after another; cos and sin (positions, S/2)."""
        num_tokens = len(tokens)
        assert (tokens.dtype, tokens.is_contiguous()) == (torch.int64, True), tokens
        assert num_tokens == sum(cache.num_queries for cache in caches), (num_tokens, caches)
        assert max(cache.num_keys for cache in caches) <= len(cos), (caches, len(cos))
        slots = (self._num_layers, num_tokens, self._sizes.num_experts_per_tok)
        results = DecoderResults(
            torch.empty((num_tokens, self._sizes.dim), dtype=self._dtype),
            torch.empty(slots),
            torch.empty(slots, dtype=torch.int64),
            torch.empty((self._num_layers, num_tokens, self._num_experts)),
        )
        hidden, weights, experts, logits = (result.data_ptr() for result in results)
        self._decoder.run(
            tokens.data_ptr(), caches, cos.data_ptr(), sin.data_ptr(), hidden, weights, experts,
            logits, torch.get_num_threads(),
        )  # fmt: skip
        return results

    def list_seconds(self) -> dict[str, float]:
        """Seconds that all runs have spent in each part of the model."""
        return self._decoder.list_seconds()
