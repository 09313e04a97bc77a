"""A whole decoder of sparse layers in one call of the extension (csrc/decoder.h).

At a few tens of microseconds per token the calls between kernels would cost more than they do.
Shapes: T tokens, D dim, H heads, G kv heads, S head_dim, L layers, E experts, K experts per token,
V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tramontane.kernels.extension import TYPES
from tramontane.kernels.extension import native_kernels as _native
from tramontane.kernels.native import describe
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
    num_experts_per_tok: int
    window: int


class CachePool(NamedTuple):
    """The keys and values of all sequences: a tensor (L, 2, num_blocks, G, block_size, S).

    `keys` is the address of the first layer's keys; the offsets are bytes. A token at position p of
    sequence b lies in block block_tables[b, p // block_size], slot p % block_size.
    """

    keys: int
    values_offset: int
    layer_offset: int
    type: int
    block_size: int  # a multiple of 16

    @staticmethod
    def locate(pool: Tensor) -> "CachePool":
        """Where a contiguous pool lies; the caller keeps its memory."""
        assert pool.dim() == 6, pool.shape
        assert pool.shape[1] == 2, pool.shape
        assert pool.is_contiguous(), pool.stride()
        layer, kind = (pool.stride(i) * pool.itemsize for i in (0, 1))
        return CachePool(pool.data_ptr(), kind, layer, TYPES[pool.dtype], pool.shape[4])


class Draws(NamedTuple):
    """How the next token of each of R rows is drawn, see `reference.sample_tokens`.

    temperature, top_p and min_p fp32 (R,), top_k int64 (R,); numbers fp64 (S, R) for S steps.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    numbers: Tensor


class Steps(NamedTuple):
    """How far one run may go on by itself, each sequence with the next token of the step before.

    At most `most` steps; none begins after so many `seconds`, nor after one in which a next token
    is among `ends` int64 (N,), or scores are not finite. It is the best token, of equals the lowest
    id, or what `draws` say.
    """

    most: int
    seconds: float
    ends: Tensor
    draws: Draws | None = None


ONE_STEP = Steps(1, 0.0, torch.empty(0, dtype=torch.int64))


class DecoderResults(NamedTuple):
    """What one run gives; R tokens are those whose next token's scores were wanted.

    What has no dimension for its S steps is of the last one.
    """

    hidden: Tensor  # (T, D), after the last norm
    weights: Tensor  # (L, T, K) fp32, of the routers
    experts: Tensor  # (S, L, T, K) int64
    router_logits: Tensor  # (L, T, E) fp32
    logits: Tensor  # (R, V) fp32
    next_tokens: Tensor  # (S, R) int64, of the first `num_choices` the best, or what was drawn
    is_finite: Tensor  # (S, R) bool, whether the first `num_choices` are


class NativeDecoder:
    """The weights of a decoder, known to the extension by address: it must not outlive them.

    The norms, the gate and the embeddings (V, D) have the dtype of the activations; of the scores
    that the head `output` gives, a next token is one of the first `num_choices`.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        layers: Sequence[LayerWeights],
        *,
        tok_embeddings: Tensor,
        norm: Tensor,
        output: Weight,
        num_choices: int,
        eps: float,
    ) -> None:
        self._dim, self._num_slots = sizes.dim, sizes.num_experts_per_tok
        self._dtype, self._num_layers = tok_embeddings.dtype, len(layers)
        self._num_experts, self._vocab_size = len(layers[0].gate), _count_rows(output)
        assert all(len(layer.gate) == self._num_experts for layer in layers), layers
        assert 1 <= num_choices <= self._vocab_size, (num_choices, self._vocab_size)
        kind = TYPES[self._dtype]
        shape = (
            sizes.dim, sizes.n_heads, sizes.n_kv_heads, sizes.head_dim, len(tok_embeddings),
            self._num_experts, sizes.window, num_choices,
        )  # fmt: skip
        self._decoder = _native.Decoder(
            shape, eps, kind, tok_embeddings.data_ptr(), norm.data_ptr(), describe(output)
        )
        for layer in layers:
            self._decoder.add_layer(
                kind,
                layer.attention_norm.data_ptr(),
                layer.ffn_norm.data_ptr(),
                tuple(describe(weight) for weight in layer.attention),
                layer.gate.data_ptr(),
                tuple(describe(weight) for weight in layer.experts),
            )

    def run(
        self,
        tokens: Tensor,
        pool: CachePool,
        num_queries: Tensor,
        num_keys: Tensor,
        block_tables: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        rows: Tensor | None = None,
        counts: Tensor | None = None,
        steps: Steps = ONE_STEP,
    ) -> DecoderResults:
        """Run tokens (T,) of B sequences, one after another, into and over the blocks of `pool`.

        Sequence b brings num_queries[b] tokens, the last of num_keys[b] (B,). Of block_tables
        (B, N) nothing is read before the window of a sequence's first new token; the others are
        believed. cos and sin (positions, S/2). `rows` (R,) are the tokens whose next token's scores
        are wanted, None: all. `counts` (T,) are experts of each token, 1 .. E; K is their maximum.
        For more than one of `steps` each sequence has to bring one token, whose scores are wanted.
        All integers int64. Raises IndexError on a token that there is not, ValueError on numbers
        that do not fit together, MemoryError.
        """
        # Python's len() of a tensor takes several times as long as its shape.
        num_tokens, num_sequences = tokens.shape[0], num_queries.shape[0]
        num_rows = num_tokens if rows is None else rows.shape[0]
        for given in (tokens, num_queries, num_keys, block_tables, rows, counts, steps.ends):
            if given is not None:
                assert (given.dtype, given.is_contiguous()) == (torch.int64, True), given
        assert num_keys.shape[0] == block_tables.shape[0] == num_sequences, (num_keys, block_tables)
        assert counts is None or len(counts) == num_tokens, (counts, num_tokens)
        assert cos.shape == sin.shape, (cos.shape, sin.shape)
        num_slots = self._num_slots if counts is None else int(counts.max())
        num_layers, most = self._num_layers, steps.most
        results = DecoderResults(
            torch.empty((num_tokens, self._dim), dtype=self._dtype),
            torch.empty((num_layers, num_tokens, num_slots)),
            torch.empty((most, num_layers, num_tokens, num_slots), dtype=torch.int64),
            torch.empty((num_layers, num_tokens, self._num_experts)),
            torch.empty((num_rows, self._vocab_size)),
            torch.empty((most, num_rows), dtype=torch.int64),
            torch.empty((most, num_rows), dtype=torch.bool),
        )
        drawn = _locate_draws(steps.draws, most, num_rows)
        hidden, weights, experts, router_logits, logits, next_tokens, is_finite = (
            result.data_ptr() for result in results
        )
        num_steps = self._decoder.run(
            tokens.data_ptr(), num_tokens, *pool, num_sequences, num_queries.data_ptr(),
            num_keys.data_ptr(), block_tables.data_ptr(), block_tables.shape[1], cos.data_ptr(),
            sin.data_ptr(), cos.shape[0], 0 if rows is None else rows.data_ptr(), num_rows,
            0 if counts is None else counts.data_ptr(), num_slots, *drawn,
            hidden, weights, experts, router_logits, logits, next_tokens, is_finite,
            most, steps.seconds, steps.ends.data_ptr(), steps.ends.shape[0],
            torch.get_num_threads(),
        )  # fmt: skip
        return results if num_steps == most else _cut(results, num_steps)

    def list_seconds(self) -> dict[str, float]:
        """Seconds that all runs have spent in each part of the model."""
        return self._decoder.list_seconds()


def _locate_draws(
    draws: Draws | None, num_steps: int, num_rows: int
) -> tuple[int, int, int, int, int]:
    if draws is None:
        return 0, 0, 0, 0, 0
    *settings, numbers = draws
    dtypes = [torch.float32, torch.int64, torch.float32, torch.float32]
    assert [s.dtype for s in settings] == dtypes, settings
    assert all(s.shape == (num_rows,) and s.is_contiguous() for s in settings), settings
    assert numbers.shape == (num_steps, num_rows), numbers.shape
    assert numbers.dtype == torch.float64, numbers.dtype
    assert numbers.is_contiguous(), numbers.stride()
    temperature, top_k, top_p, min_p = (setting.data_ptr() for setting in settings)
    return temperature, top_k, top_p, min_p, numbers.data_ptr()


def _cut(results: DecoderResults, num_steps: int) -> DecoderResults:
    """The results of the steps that have run, where more had their place."""
    return results._replace(
        experts=results.experts[:num_steps],
        next_tokens=results.next_tokens[:num_steps],
        is_finite=results.is_finite[:num_steps],
    )


def _count_rows(weight: Weight) -> int:
    return weight.out_features if isinstance(weight, PackedWeight) else len(weight)
