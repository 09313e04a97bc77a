"""Forward passes over a paged cache, without an engine."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tramontane.engine.kv_cache import KVPool, PagedBatch, build_layer_states
from tramontane.engine.native_model import NativeModel
from tramontane.kernels.native_decoder import DecoderResults
from tramontane.models.transformer import ForwardOutput, Transformer

BLOCK = 16


class PagedSequences:
    """The caches of several sequences of at most `max_tokens` tokens, their blocks shuffled."""

    def __init__(self, model: Transformer, *, count: int = 1, max_tokens: int = 256) -> None:
        self.model = model
        per_sequence = -(-max_tokens // BLOCK)
        order = torch.randperm(count * per_sequence, generator=torch.Generator().manual_seed(count))
        self._tables = order.view(count, per_sequence)
        self.lengths = [0] * count
        self.pool = KVPool(
            model.config, count * per_sequence, dtype=model.norm.weight.dtype, block_size=BLOCK
        )

    def run(self, tokens: Tensor, seqlens: Sequence[int]) -> ForwardOutput:
        """The model's own pass over the next tokens, seqlens[i] of them of sequence i."""
        batch, positions = self._begin(seqlens)
        states = build_layer_states(self.pool, batch)
        output = self.model(tokens, positions, states)
        self._end(seqlens)
        return output

    def run_natively(
        self, native: NativeModel, tokens: Tensor, seqlens: Sequence[int]
    ) -> DecoderResults | None:
        """The same in one native call, with scores for every token."""
        batch, _ = self._begin(seqlens)
        output = native.run(tokens, self.pool, batch)
        self._end(seqlens)
        return output

    def _begin(self, seqlens: Sequence[int]) -> tuple[PagedBatch, Tensor]:
        active = [i for i, count in enumerate(seqlens) if count]
        queries = torch.tensor([seqlens[i] for i in active])
        keys = torch.tensor([self.lengths[i] + seqlens[i] for i in active])
        positions = torch.cat([
            torch.arange(self.lengths[i], self.lengths[i] + seqlens[i]) for i in active
        ])  # fmt: skip
        batch = PagedBatch(self._tables[active].contiguous(), queries, keys, int(keys.max()))
        return batch, positions

    def _end(self, seqlens: Sequence[int]) -> None:
        self.lengths = [have + more for have, more in zip(self.lengths, seqlens, strict=True)]
