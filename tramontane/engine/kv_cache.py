"""Keys and values of one sequence: contiguous, or rolling where there is a sliding window.

A token at position p lies in slot p mod the number of slots. With a window of 4 and positions
0 .. 5 written, the slots hold positions [4, 5, 2, 3]; the next token, 6, replaces 2. Source:
arXiv:2310.06825, section 2.

Shapes: T new tokens, M visible keys, C slots, H heads, G kv heads, S head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tramontane.config import ModelConfig
from tramontane.errors import CapacityError
from tramontane.kernels.dispatch import get_kernels
from tramontane.kernels.native_decoder import CachePool


class LayerCache:
    """The cache of one layer: an attention state of `nn.attention`. keys and values (G, C, S)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.num_tokens = 0
        self._keys, self._values = keys, values
        self._num_slots = keys.shape[1]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        """Keep k and v (T, G, S); return what q (T, H, S) reads of them and of what was kept."""
        start, self.num_tokens = self.num_tokens, self.num_tokens + len(k)
        attention = get_kernels().causal_attention
        k, v = k.transpose(0, 1), v.transpose(0, 1)  # (G, T, S)
        if self.num_tokens <= self._num_slots:
            self._write(k, v, start=start)
            seen = slice(0, self.num_tokens)
            return attention(q, self._keys[:, seen], self._values[:, seen], window=window)
        assert (window or self.num_tokens) <= self._num_slots, (window, self._num_slots)
        if len(q) == 1:
            # All slots are in the window now, and attention does not depend on their order.
            self._write(k, v, start=start)
            return attention(q, self._keys, self._values, window=None)
        # The first new token still sees keys that the last ones will replace: attend, then write.
        old = self._list_slots(start)
        keys = torch.cat((self._keys[:, old], k), dim=1)  # (G, M, S)
        values = torch.cat((self._values[:, old], v), dim=1)
        self._write(k, v, start=start)
        return attention(q, keys, values, window=window)

    def _list_slots(self, end: int) -> Tensor:
        """Slots of the last positions before `end`, oldest first: [2, 3, 0, 1] for 6 of 4 slots."""
        positions = torch.arange(max(0, end - self._num_slots), end, device=self._keys.device)
        return positions % self._num_slots

    def _write(self, k: Tensor, v: Tensor, *, start: int) -> None:
        """Store (G, T, S) at positions `start` and after; of more than C tokens only the last C."""
        skipped = max(0, k.shape[1] - self._num_slots)
        first = (start + skipped) % self._num_slots
        count = k.shape[1] - skipped
        before_wrap = min(count, self._num_slots - first)
        for buffer, new in ((self._keys, k[:, skipped:]), (self._values, v[:, skipped:])):
            buffer[:, first : first + before_wrap] = new[:, :before_wrap]
            buffer[:, : count - before_wrap] = new[:, before_wrap:]


class KVCache:
    """The caches of all layers of one sequence of at most `max_tokens` tokens, allocated at once.

    Raises CapacityError, naming the bytes, if there is no memory for them.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        num_slots = min(max_tokens, config.sliding_window or max_tokens)
        shape = (config.n_layers, 2, config.n_kv_heads, num_slots, config.head_dim)
        self.num_bytes = config.count_kv_bytes_per_token(bytes_per_value=dtype.itemsize) * num_slots
        try:
            self._buffer = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # torch has no narrower type for a failed allocation
            raise CapacityError(
                f"no memory for a cache of {num_slots} tokens ({self.num_bytes} bytes); lower "
                "max_tokens or shorten the prompt"
            ) from error
        self.layers = [LayerCache(*layer) for layer in self._buffer]

    def has_room(self, num_tokens: int) -> bool:
        """Whether so many more tokens fit without going around a rolling cache."""
        return self.num_tokens + num_tokens <= self._buffer.shape[3]

    @property
    def pool(self) -> CachePool:
        """The cache as the extension reads it: one block."""
        return CachePool.locate(self._buffer[:, :, None])

    def advance(self, num_tokens: int) -> None:
        """The extension has written the keys and values of so many new tokens."""
        for layer in self.layers:
            layer.num_tokens += num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that have gone through all layers."""
        return self.layers[-1].num_tokens


class BatchedLayerCache:
    """One layer's caches of several sequences; their new tokens lie one after another."""

    def __init__(self, caches: Sequence[LayerCache], seqlens: Sequence[int]) -> None:
        assert len(caches) == len(seqlens), (len(caches), len(seqlens))
        self._caches, self._seqlens = caches, list(seqlens)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        """Each sequence attends to its own cache; q (T, H, S) with T = sum(seqlens)."""
        parts = zip(self._caches, *(x.split(self._seqlens) for x in (q, k, v)), strict=True)
        return torch.cat([cache.attend(*qkv, window=window) for cache, *qkv in parts])


def batch_layer_caches(
    caches: Sequence[KVCache], seqlens: Sequence[int]
) -> list[LayerCache] | list[BatchedLayerCache]:
    """The state of each layer for a forward pass over these sequences."""
    if len(caches) == 1:
        return caches[0].layers
    return [
        BatchedLayerCache(layers, seqlens)
        for layers in zip(*(cache.layers for cache in caches), strict=True)
    ]
