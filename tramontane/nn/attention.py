"""Grouped-query attention (arXiv:2305.13245), the first mixer, and the state that a mixer keeps.

The mixer projects and turns; what it attends to is its state's business: nothing but the tokens at
hand (`PackedSequences`), or also a cache (`engine/kv_cache.py`).
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from tramontane.config import ModelConfig
from tramontane.kernels.dispatch import get_kernels
from tramontane.nn.linear import Linear
from tramontane.nn.rope import RopeAngles


class AttentionState(Protocol):
    """What one layer's attention keeps between tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        """Keep k and v (T, G, S) of the new tokens; return what q (T, H, S) reads, (T, H, S)."""
        ...


class PackedSequences:
    """No memory: sequences lie one after another in the batch, and none sees another.

    With seqlens (3, 2), tokens 0-2 are the first sequence and 3-4 the second. One object serves
    all layers. Training packs documents this way.
    """

    def __init__(self, seqlens: Sequence[int]) -> None:
        self.seqlens = tuple(seqlens)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
        """Each sequence attends causally to itself."""
        keys, values = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()  # (G, T, S)
        return get_kernels().packed_attention(q, keys, values, self.seqlens, window=window)


class Attention(nn.Module):
    """Causal attention with `n_kv_heads` shared keys and values, RoPE, and an optional window."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.sliding_window
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)

    def forward(self, x: Tensor, rope: RopeAngles, state: AttentionState) -> Tensor:
        """x (T, D) -> (T, D); rope holds the angles of the T positions."""
        rotate = get_kernels().rotate
        q = rotate(self.wq(x).unflatten(1, (-1, self.head_dim)), *rope)  # (T, H, S)
        k = rotate(self.wk(x).unflatten(1, (-1, self.head_dim)), *rope)  # (T, G, S)
        v = self.wv(x).unflatten(1, (-1, self.head_dim))  # (T, G, S)
        return self.wo(state.attend(q, k, v, window=self.window).flatten(1))
