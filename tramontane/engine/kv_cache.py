"""Keys and values of all sequences in one pool of blocks; which block is whose, block_manager says.

Shapes: L layers, N blocks, G kv heads, P tokens per block, S head_dim, T new tokens, B sequences.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from tramontane.config import ModelConfig
from tramontane.engine.block_manager import BLOCK_SIZE
from tramontane.errors import CapacityError
from tramontane.kernels.dispatch import get_kernels
from tramontane.kernels.native_decoder import CachePool


class KVPool:
    """The pool (L, 2, N, G, P, S). Raises CapacityError, naming the bytes, if memory refuses it."""

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        block_size: int = BLOCK_SIZE,
    ) -> None:
        assert block_size % 16 == 0, block_size  # the extension reads 16 keys at a time
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_bytes = count_block_bytes(config, dtype, block_size=block_size) * num_blocks
        shape = (config.n_layers, 2, num_blocks, config.n_kv_heads, block_size, config.head_dim)
        try:
            self.buffer = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # torch has no narrower type for a failed allocation
            raise CapacityError(
                f"no memory for a cache of {num_blocks * block_size} tokens ({self.num_bytes} "
                "bytes); lower kv_cache_memory_bytes or max_num_seqs"
            ) from error

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the content of blocks (from, to), one after another, in all layers."""
        for source, target in pairs:
            self.buffer[:, :, target] = self.buffer[:, :, source]

    @cached_property
    def location(self) -> CachePool:
        """Where the extension finds it."""
        return CachePool.locate(self.buffer)


class PagedBatch(NamedTuple):
    """The sequences of a pass: block_tables (B, blocks), num_queries and num_keys (B,), all int64.

    `num_keys` counts the new tokens too, which lie one sequence after another in the batch; none is
    above `longest`.
    """

    block_tables: Tensor
    num_queries: Tensor
    num_keys: Tensor
    longest: int

    def find_slots(self, block_size: int) -> Tensor:
        """Where in the pool each new token goes, block * block_size + offset, (T,) int64."""
        slots = []
        for table, count, end in zip(*self[:3], strict=True):
            positions = torch.arange(int(end - count), int(end), device=table.device)
            slots.append(table[positions // block_size] * block_size + positions % block_size)
        return torch.cat(slots)


class PagedLayer:
    """One layer of the pool for the sequences of a pass: an attention state of `nn.attention`."""

    def __init__(self, layer: Tensor, batch: PagedBatch, slots: Tensor) -> None:
        self._keys, self._values = layer  # (N, G, P, S) each
        self._batch, self._slots = batch, slots

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        """Keep k and v (T, G, S); return what q (T, H, S) reads, each sequence of its own."""
        kernels = get_kernels()
        kernels.store_paged(k, v, self._keys, self._values, self._slots)
        return kernels.paged_attention(q, self._keys, self._values, *self._batch[:3], window=window)


def build_layer_states(pool: KVPool, batch: PagedBatch) -> list[PagedLayer]:
    """The state of each layer for a forward pass over these sequences."""
    slots = batch.find_slots(pool.block_size)
    return [PagedLayer(layer, batch, slots) for layer in pool.buffer]


def count_block_bytes(
    config: ModelConfig, dtype: torch.dtype, *, block_size: int = BLOCK_SIZE
) -> int:
    """Bytes of a block in all layers."""
    return config.count_kv_bytes_per_token(bytes_per_value=dtype.itemsize) * block_size
