"""The kernels of `reference.py` in C++ (csrc/), for the CPU.

What they do not compute (most gradients, other devices, dtypes and layouts) goes to `fused`, which
refuses what does not fit together. Shapes as in `reference.py`.

A row's bits depend neither on the rows that come with it nor on the number of threads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tramontane.errors import ConfigError
from tramontane.kernels import fused
from tramontane.kernels.extension import TYPES, is_plain, wants_gradient
from tramontane.kernels.extension import native_kernels as _native
from tramontane.kernels.fused import linear_cross_entropy
from tramontane.kernels.fused.experts import MoeExperts
from tramontane.kernels.native_elementwise import ACTIVATION, rms_norm, rotate, swiglu
from tramontane.kernels.packing import PackedWeight
from tramontane.kernels.reference import check_counts, store_paged

# The kernels; `describe` is for those who know that it is these.
__all__ = [
    "causal_attention",
    "is_finite",
    "linear",
    "linear_cross_entropy",
    "moe_experts",
    "packed_attention",
    "paged_attention",
    "quantized_experts",
    "quantized_linear",
    "rms_norm",
    "rotate",
    "sample_tokens",
    "store_paged",
    "swiglu",
    "top_k_router",
    "top_k_routing",
]

_INFINITIES = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # bits


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.linear`."""
    fits = weight.dim() == 2 and x.shape[-1:] == weight.shape[1:]
    if not (fits and _runs_natively(x, weight)):
        return fused.linear(x, weight)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return _multiply(x, describe(weight), out)


def quantized_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """See `reference.quantized_linear`."""
    if not (x.shape[-1] == weight.in_features and _runs_natively(x)):
        return fused.quantized_linear(x, weight)
    out = x.new_empty((*x.shape[:-1], weight.out_features))
    return _multiply(x, describe(weight), out)


def moe_experts(
    x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> Tensor:
    """See `reference.moe_experts`. Raises IndexError on an expert that there is not."""
    num_experts, hidden_dim, dim = w1.shape
    fits = (
        w3.shape == w1.shape
        and w2.shape == (num_experts, dim, hidden_dim)
        and w3.dtype == w1.dtype
        and x.shape == (len(experts), dim)
    )
    firsts = (w1[:1], w2[:1], w3[:1])  # the matrices of a stack may lie apart
    if not (fits and _is_routing(weights, experts) and _runs_natively(x, *firsts)):
        if is_plain(x):
            return MoeExperts.apply(x, weights, experts, w1, w2, w3, ACTIVATION)
        return fused.moe_experts(x, weights, experts, w1, w2, w3)
    described = (describe(w1), describe(w2), describe(w3))
    return _run_experts(x, weights, experts, described, num_experts=num_experts)


def quantized_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w1: PackedWeight,
    w2: PackedWeight,
    w3: PackedWeight,
) -> Tensor:
    """See `reference.quantized_experts`. Raises IndexError on an expert that there is not."""
    dim, hidden_dim = w1.in_features, w1.out_features
    fits = (
        (w3.in_features, w3.out_features, w3.group_size) == (dim, hidden_dim, w1.group_size)
        and (w2.in_features, w2.out_features) == (hidden_dim, dim)
        and len(w1.qweight) == len(w2.qweight) == len(w3.qweight)
        and x.shape == (len(experts), dim)
    )
    if not (fits and _is_routing(weights, experts) and _runs_natively(x)):
        return fused.quantized_experts(x, weights, experts, w1, w2, w3)
    described = (describe(w1), describe(w2), describe(w3))
    return _run_experts(x, weights, experts, described, num_experts=len(w1.qweight))


def top_k_router(
    x: Tensor, weight: Tensor, num_experts_per_tok: int, counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.top_k_router`."""
    (num_tokens, dim), num_experts = x.shape, len(weight)
    fits = weight.shape[1:] == (dim,) and num_experts_per_tok <= num_experts
    if not (fits and _runs_natively(x, weight)):
        return fused.top_k_router(x, weight, num_experts_per_tok, counts)
    if counts is not None:
        check_counts(counts, num_tokens, num_experts_per_tok)
        counts = counts.cpu().contiguous()
    weights = x.new_empty((num_tokens, num_experts_per_tok), dtype=torch.float32)
    experts = x.new_empty((num_tokens, num_experts_per_tok), dtype=torch.int64)
    logits = x.new_empty((num_tokens, num_experts), dtype=torch.float32)
    _native.router(
        x.data_ptr(), TYPES[x.dtype], weight.data_ptr(), TYPES[weight.dtype], num_tokens, dim,
        num_experts, num_experts_per_tok, 0 if counts is None else counts.data_ptr(),
        weights.data_ptr(), experts.data_ptr(), logits.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return weights, experts, logits


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
    """See `reference.causal_attention`."""
    if not (len(q) <= k.shape[1] and _attends_natively(q, k, v)):
        return fused.causal_attention(q, k, v, window=window)
    out = torch.empty_like(q)
    _attend(q, k, v, out, window=window)
    return out


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], *, window: int | None = None
) -> Tensor:
    """See `reference.packed_attention`."""
    if not (sum(seqlens) == len(q) == k.shape[1] and _attends_natively(q, k, v)):
        return fused.packed_attention(q, k, v, seqlens, window=window)
    out, start = torch.empty_like(q), 0
    for length in seqlens:
        part = slice(start, start + length)
        _attend(q[part], k[:, part], v[:, part], out[part], window=window)
        start += length
    return out


def paged_attention(
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    num_queries: Tensor,
    num_keys: Tensor,
    *,
    window: int | None = None,
) -> Tensor:
    """See `reference.paged_attention`. Blocks that are read are believed.

    Raises ValueError on sequences that do not fit the tokens or their blocks.
    """
    (_, num_heads, head_dim), num_kv_heads = q.shape, key_pool.shape[1]
    tables = (block_tables, num_queries, num_keys)
    fits = (
        key_pool.shape == value_pool.shape
        and key_pool.shape[3] == head_dim
        and key_pool.shape[2] % 16 == 0  # else keys before the window could be read
        and num_kv_heads > 0
        and num_heads % num_kv_heads == 0
        and key_pool.dtype == value_pool.dtype
        and all(t.is_cpu and t.is_contiguous() and t.dtype == torch.int64 for t in tables)
        and block_tables.shape[0] == len(num_queries) == len(num_keys)
    )
    if not (fits and _runs_natively(q, key_pool, value_pool)):
        return fused.paged_attention(
            q, key_pool, value_pool, block_tables, num_queries, num_keys, window=window
        )
    out = torch.empty_like(q)
    _native.paged_attention(
        q.data_ptr(), TYPES[q.dtype], len(q), key_pool.data_ptr(), value_pool.data_ptr(),
        TYPES[key_pool.dtype], key_pool.shape[2], len(num_queries), num_queries.data_ptr(),
        num_keys.data_ptr(), block_tables.data_ptr(), block_tables.shape[1], num_heads,
        num_kv_heads, head_dim, window or 0, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def top_k_routing(
    logits: Tensor, num_experts_per_tok: int, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.top_k_routing`; `top_k_router` does it together with the logits."""
    return fused.top_k_routing(logits, num_experts_per_tok, counts)


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    numbers: Tensor,
) -> Tensor:
    """See `reference.sample_tokens`. Rows may lie apart: the first columns of wider ones."""
    settings = (temperature, top_k, top_p, min_p, numbers)
    dtypes = [setting.dtype for setting in settings]
    fits = (
        logits.dtype == torch.float32
        and logits.is_cpu
        and logits.shape[1] > 0
        and logits.stride(1) == 1
        and dtypes == [torch.float32, torch.int64, torch.float32, torch.float32, torch.float64]
        and all(s.is_cpu and s.is_contiguous() and s.shape == logits.shape[:1] for s in settings)
    )
    if not fits:
        return fused.sample_tokens(logits, *settings)
    tokens, (num_rows, num_columns) = torch.empty_like(top_k), logits.shape
    _native.sample(
        logits.data_ptr(), num_rows, num_columns, logits.stride(0), temperature.data_ptr(),
        top_k.data_ptr(), top_p.data_ptr(), min_p.data_ptr(), numbers.data_ptr(),
        tokens.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return tokens


def is_finite(x: Tensor) -> bool:
    """See `reference.is_finite`."""
    infinity = _INFINITIES.get(x.dtype)
    if infinity is None or not (x.is_cpu and x.is_contiguous()):
        return fused.is_finite(x)
    return _native.is_finite(
        x.data_ptr(), x.numel(), x.element_size(), infinity, torch.get_num_threads()
    )


def _runs_natively(*tensors: Tensor) -> bool:
    return is_plain(*tensors) and not wants_gradient(*tensors)


def _is_routing(weights: Tensor, experts: Tensor) -> bool:
    """Whether a router's choice is of the dtypes that the extension reads, and not to be learnt."""
    return (
        weights.shape == experts.shape
        and weights.dtype == torch.float32
        and experts.dtype == torch.int64
        and weights.is_cpu
        and experts.is_cpu
        and not (weights.requires_grad and torch.is_grad_enabled())
    )


def _attends_natively(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """As `_runs_natively`; the heads of keys and values may be some tokens farther apart."""
    num_kv_heads, num_keys, head_dim = k.shape
    step = _find_head_step(k)
    fits = (
        k.shape == v.shape
        and q.shape[2] == head_dim
        and num_kv_heads > 0
        and q.shape[1] % num_kv_heads == 0
        and k.dtype == v.dtype
        and step == _find_head_step(v)
        and k.stride()[1:] == v.stride()[1:] == (head_dim, 1)
        and step % head_dim == 0
        and step >= num_keys * head_dim
    )
    return fits and _runs_natively(q, k[:1, :1], v[:1, :1])


def _find_head_step(x: Tensor) -> int:
    """Numbers from one head of (G, M, S) to the next; the stride of a single head says nothing."""
    return x.stride(0) if len(x) > 1 else x.shape[1] * x.shape[2]


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, window: int | None) -> None:
    num_queries, num_heads, head_dim = q.shape
    _native.attention(
        q.data_ptr(), TYPES[q.dtype], k.data_ptr(), v.data_ptr(), TYPES[k.dtype], num_queries,
        k.shape[1], num_heads, k.shape[0], head_dim, _find_head_step(k) // head_dim, window or 0,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def describe(weight: Tensor | PackedWeight) -> "_native.Weight":
    """A matrix (N, M), or a stack of them, for the extension; the caller keeps its memory.

    The matrices of a plain stack are contiguous, and may lie apart as in a file (docs/kernels.md).
    """
    if isinstance(weight, PackedWeight):
        _check_packed(weight)
        zeros = 0 if weight.zeros is None else weight.zeros.data_ptr()
        return _native.Weight(
            weight.qweight.data_ptr(), 0, weight.bits, weight.scales.data_ptr(), zeros,
            weight.out_features, weight.in_features, weight.group_size, 0,
        )  # fmt: skip
    num_rows, num_columns = weight.shape[-2:]
    expert_stride = weight.stride(0) if weight.dim() == 3 else 0
    return _native.Weight(
        weight.data_ptr(), TYPES[weight.dtype], 0, 0, 0, num_rows, num_columns, 0, expert_stride
    )


def _check_packed(weight: PackedWeight) -> None:
    parts = [weight.qweight, weight.scales, *([] if weight.zeros is None else [weight.zeros])]
    is_intact = weight.scales.dtype == torch.float16
    if not is_intact or not all(part.is_cpu and part.is_contiguous() for part in parts):
        raise ConfigError(
            f"packed weights have scales in {weight.scales.dtype} on {weight.scales.device}; a "
            "quantised model may not be cast or moved: load it again"
        )


def _multiply(x: Tensor, weight: "_native.Weight", out: Tensor) -> Tensor:
    if out.numel():
        num_rows = out.numel() // out.shape[-1]
        _native.linear(
            x.data_ptr(), TYPES[x.dtype], num_rows, (weight,), (out.data_ptr(),),
            torch.get_num_threads(),
        )  # fmt: skip
    return out


def _run_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    described: "tuple[_native.Weight, _native.Weight, _native.Weight]",
    *,
    num_experts: int,
) -> Tensor:
    out = torch.empty_like(x)
    weights, experts = weights.contiguous(), experts.contiguous()
    w1, w2, w3 = described
    _native.experts(
        x.data_ptr(), TYPES[x.dtype], len(x), num_experts, experts.shape[1], weights.data_ptr(),
        experts.data_ptr(), w1, w2, w3, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
