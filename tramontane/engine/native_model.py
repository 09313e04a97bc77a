"""A sparse model on the CPU as one call of the native extension: the same bits, fewer steps.

`build_native_model` says no, and the model's own forward pass runs, where a part is not one that
the extension has: dense layers, other dtypes or devices, modules of another kind.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tramontane.config import ModelConfig
from tramontane.engine.kv_cache import KVPool, PagedBatch
from tramontane.errors import CapacityError
from tramontane.kernels import native
from tramontane.kernels.dispatch import get_kernels
from tramontane.kernels.extension import TYPES
from tramontane.kernels.native_decoder import (
    ONE_STEP,
    DecoderResults,
    DecoderSizes,
    LayerWeights,
    NativeDecoder,
    Steps,
    Weight,
)
from tramontane.models.transformer import DecoderLayer, Transformer
from tramontane.nn.attention import Attention
from tramontane.nn.experts import GroupedExperts
from tramontane.nn.linear import Linear
from tramontane.nn.moe import MoeLayer
from tramontane.nn.norm import RMSNorm
from tramontane.nn.rope import RopeAngles, compute_rope
from tramontane.nn.router import TopKRouter
from tramontane.quant.modules import QuantizedExperts, QuantizedLinear


class NativeModel:
    """Runs batches of sequences through `model`, whose weights the extension reads in place."""

    def __init__(
        self,
        model: Transformer,
        layers: Sequence[LayerWeights],
        *,
        output: Weight,
        num_choices: int,
    ) -> None:
        config = model.config
        assert config.moe is not None
        self._config = config
        self._first = next(model.parameters())
        self._address = self._first.data_ptr()
        # What the extension reads stays, even if the model gets other weights.
        self._kept = [tensor.untyped_storage() for tensor in _list_tensors(model)]
        self._rope = RopeAngles(torch.empty(0), torch.empty(0))
        sizes = DecoderSizes(
            config.dim, config.n_heads, config.n_kv_heads, config.head_dim,
            config.moe.num_experts_per_tok, config.sliding_window or 0,
        )  # fmt: skip
        self._decoder = NativeDecoder(
            sizes,
            layers,
            tok_embeddings=model.tok_embeddings.weight,
            norm=model.norm.weight,
            output=output,
            num_choices=num_choices,
            eps=config.norm_eps,
        )

    def run(
        self,
        tokens: Tensor,
        pool: KVPool,
        batch: PagedBatch,
        *,
        rows: Tensor | None = None,
        counts: Tensor | None = None,
        steps: Steps = ONE_STEP,
    ) -> DecoderResults | None:
        """See `NativeDecoder.run`. None: the model has moved since, and this is not for it.

        Raises CapacityError if there is no memory for so many tokens.
        """
        if self._first.data_ptr() != self._address:
            return None
        rope = self._find_rope(batch.longest)
        try:
            return self._decoder.run(
                tokens,
                pool.location,
                batch.num_queries,
                batch.num_keys,
                batch.block_tables,
                *rope,
                rows=rows,
                counts=counts,
                steps=steps,
            )
        except MemoryError as error:
            raise CapacityError(
                f"no memory to run {len(tokens)} tokens at once; lower max_num_batched_tokens"
            ) from error

    def list_seconds(self) -> dict[str, float]:
        """Seconds that all runs have spent in each part of the model."""
        return self._decoder.list_seconds()

    def _find_rope(self, num_positions: int) -> RopeAngles:
        """The angles of at least so many positions, doubled when they do not suffice."""
        if self._rope.cos.shape[0] < num_positions:
            positions = torch.arange(max(num_positions, 2 * len(self._rope.cos), 1024))
            self._rope = compute_rope(
                positions, head_dim=self._config.head_dim, theta=self._config.rope_theta
            )
        return self._rope


class TensorState(NamedTuple):
    """Differs if a tensor is another, or was written to since."""

    address: int
    dtype: torch.dtype
    shape: torch.Size
    version: int


def _list_tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def list_tensor_states(model: nn.Module) -> list[TensorState]:
    """Of all weights: equal if the model still has those it had."""
    return [
        TensorState(t.data_ptr(), t.dtype, t.shape, 0 if t.is_inference() else t._version)
        for t in _list_tensors(model)
    ]


def build_native_model(model: Transformer, *, num_choices: int | None = None) -> NativeModel | None:
    """The model for the extension, or None if a part of it is none of those it has.

    Of the scores of the next token, the first `num_choices` count (None: all).
    """
    if get_kernels() is not native or model.config.moe is None:
        return None
    # The matrices of a stack may lie apart, as in a file.
    parts = [value[:1] if value.dim() == 3 else value for value in model.parameters()]
    if not all(part.is_cpu and part.is_contiguous() for part in [*parts, *model.buffers()]):
        return None
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return None
    layers = []
    for layer in model.layers:
        weights = _list_weights(layer, model.config)
        if weights is None:
            return None
        layers.append(weights)
    output = _find_weight(model.output)
    if output is None:
        return None
    plain = [model.tok_embeddings.weight, model.norm.weight]
    for weights in layers:
        plain += [weights.attention_norm, weights.ffn_norm, weights.gate]
    dtypes = {tensor.dtype for tensor in plain}
    if len(dtypes) != 1 or not dtypes <= set(TYPES):
        return None
    num_choices = num_choices or model.config.vocab_size
    return NativeModel(model, layers, output=output, num_choices=num_choices)


def _list_weights(layer: nn.Module, config: ModelConfig) -> LayerWeights | None:
    """The weights of a layer whose parts are exactly those that the extension computes."""
    if type(layer) is not DecoderLayer or type(layer.feed_forward) is not MoeLayer:
        return None
    attention, block = layer.attention, layer.feed_forward
    norms = (layer.attention_norm, layer.ffn_norm)
    assert config.moe is not None
    is_known = (
        type(attention) is Attention
        and type(block.gate) is TopKRouter
        and all(type(norm) is RMSNorm and norm.eps == config.norm_eps for norm in norms)
        and attention.window == config.sliding_window
        and block.gate.num_experts_per_tok == config.moe.num_experts_per_tok
        and len(block.gate.weight) == config.moe.num_experts
    )
    matrices = [_find_weight(m) for m in (attention.wq, attention.wk, attention.wv, attention.wo)]
    wq, wk, wv, wo = matrices
    stacks = _find_stacks(block.experts)
    if not is_known or stacks is None or wq is None or wk is None or wv is None or wo is None:
        return None
    return LayerWeights(
        layer.attention_norm.weight,
        layer.ffn_norm.weight,
        (wq, wk, wv, wo),
        block.gate.weight,
        stacks,
    )


def _find_stacks(experts: nn.Module) -> tuple[Weight, Weight, Weight] | None:
    if type(experts) is GroupedExperts:
        stacks = (experts.w1, experts.w2, experts.w3)
        has_types = all(stack.dtype in TYPES for stack in stacks)
        return stacks if has_types and experts.w1.dtype == experts.w3.dtype else None
    if type(experts) is not QuantizedExperts:
        return None
    w1, w2, w3 = experts.w1.packed, experts.w2.packed, experts.w3.packed
    return (w1, w2, w3) if w1.group_size == w3.group_size else None


def _find_weight(module: nn.Module) -> Weight | None:
    if type(module) is Linear and module.weight.dtype in TYPES:
        return module.weight
    return module.packed if type(module) is QuantizedLinear else None
