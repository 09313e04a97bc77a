"""The specification of every kernel in plain torch: slow, differentiable, obviously right.

Shapes: T tokens, M keys, D dim, F hidden_dim, E experts, K experts per token, H heads, G kv heads,
S head_dim, V vocabulary. Sums that matter are taken in fp32 and cast once, at the end.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tramontane.kernels.packing import PackedWeight, dequantize


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: x (..., M), W (N, M), returns (..., N) in the dtype of x."""
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, cast to the dtype of x (..., D), times weight (D,)."""
    x_float = x.float()
    inverse_rms = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)
    return (x_float * inverse_rms).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn the pairs (i, i + S/2) of x (T, H, S) by the angles of cos, sin (T, S/2), in fp32.

    Halves, not neighbours, form a pair, as in Hugging Face checkpoints; `checkpoint/` permutes the
    weights of the formats that pair neighbours.
    """
    first, second = x.float().chunk(2, dim=-1)  # (T, H, S/2) each
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, S/2)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
    """Attention of the last T of M positions of one sequence over all of them.

    q (T, H, S); k, v (G, M, S); returns (T, H, S). Query i stands at position p = M - T + i and
    sees the keys max(0, p - window + 1) .. p. Head h reads kv head h // (H / G). Softmax in fp32.
    """
    num_queries, num_heads, head_dim = q.shape
    num_keys = k.shape[1]
    repeats = num_heads // k.shape[0]
    k, v = k.repeat_interleave(repeats, dim=0), v.repeat_interleave(repeats, dim=0)  # (H, M, S)
    scores = q.transpose(0, 1) @ k.transpose(1, 2) * head_dim**-0.5  # (H, T, M)
    query_at = torch.arange(num_keys - num_queries, num_keys, device=q.device)[:, None]
    key_at = torch.arange(num_keys, device=q.device)[None]
    hidden = key_at > query_at
    if window is not None:
        hidden = hidden | (key_at <= query_at - window)
    scores = scores.float().masked_fill(hidden, float("-inf"))
    return (torch.softmax(scores, dim=-1).to(q.dtype) @ v).transpose(0, 1)  # (T, H, S)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Sequence[int], *, window: int | None = None
) -> Tensor:
    """`causal_attention` of several sequences that lie one after another, each to itself.

    q (T, H, S); k, v (G, T, S); T = sum(seqlens); returns (T, H, S).
    """
    lengths = list(seqlens)
    parts = zip(q.split(lengths), k.split(lengths, 1), v.split(lengths, 1), strict=True)
    return torch.cat([causal_attention(*part, window=window) for part in parts])


def top_k_routing(logits: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """Choose the K largest of the logits (T, E); weights are their softmax (arXiv:2401.04088).

    Returns fp32 weights (T, K) in falling order and int64 experts (T, K). Of equal logits the lower
    expert index comes first, which `torch.topk` alone does not promise.
    """
    ordered, experts = torch.sort(logits.float(), dim=-1, descending=True, stable=True)
    weights = torch.softmax(ordered[:, :num_experts_per_tok], dim=-1)
    return weights, experts[:, :num_experts_per_tok]


def top_k_router(
    x: Tensor, weight: Tensor, num_experts_per_tok: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtral's router, x (T, D) and weight (E, D): weights and experts (T, K), logits (T, E).

    The product is in the dtype of x, the rest in fp32; see `top_k_routing`.
    """
    logits = linear(x, weight).float()
    weights, experts = top_k_routing(logits, num_experts_per_tok)
    return weights, experts, logits


def moe_experts(
    x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> Tensor:
    """y_t = sum_k weights[t, k] * w2_e silu(w1_e x_t) * (w3_e x_t) with e = experts[t, k].

    x (T, D), weights and experts (T, K), w1 and w3 (E, F, D), w2 (E, D, F); returns (T, D) in the
    dtype of x. The sum runs in fp32 over the token's own slots k = 0, 1, ..., not in expert order.
    """
    num_slots = experts.shape[1]
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot in range(num_slots):
        out = torch.zeros_like(x)
        for expert in range(w1.shape[0]):
            rows = torch.nonzero(experts[:, slot] == expert).flatten()  # (N,)
            hidden = F.silu(x[rows] @ w1[expert].t()) * (x[rows] @ w3[expert].t())  # (N, F)
            out = out.index_put((rows,), hidden @ w2[expert].t())
        y = y + weights[:, slot, None] * out.float()
    return y.to(x.dtype)


def quantize_rows(x: Tensor, *, group_size: int) -> tuple[Tensor, Tensor]:
    """Round groups of g values of x (T, K) to int8: x ~ q * scale with scale = max |x| / 127.

    Returns q (T, K) and fp32 scales (T, K/g); halves round to even. A group of zeros has scale 0.
    """
    groups = x.float().unflatten(-1, (-1, group_size))  # (T, K/g, g)
    scales = groups.abs().amax(-1) / 127  # (T, K/g)
    q = torch.round(groups / scales.masked_fill(scales == 0, 1.0)[..., None])
    # Below 1e-42 the scale itself is rounded so far that quotients would exceed int8.
    return q.clamp_(-127, 127).to(torch.int8).flatten(-2), scales


def quantized_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """x W^T, (T, K) -> (T, N) in the dtype of x, both sides rounded in the weight's groups.

    The product of what `quantize_rows` and `pack` stand for, in fp32. For inference: no gradients.
    """
    q, scales = quantize_rows(x, group_size=weight.group_size)
    rounded = (q.unflatten(-1, (-1, weight.group_size)) * scales[..., None]).flatten(-2)
    return (rounded @ dequantize(weight).t()).to(x.dtype)


def quantized_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w1: PackedWeight,
    w2: PackedWeight,
    w3: PackedWeight,
) -> Tensor:
    """`moe_experts` with each product as in `quantized_linear`, in fp32 up to the sum over slots.

    x (T, D), weights and experts (T, K), w1 and w3 stacks of (F, D), w2 of (D, F); returns (T, D)
    in the dtype of x. Hidden values stay in fp32 between the products. No gradients.
    """
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot in range(experts.shape[1]):
        for expert in experts[:, slot].unique().tolist():
            rows = torch.nonzero(experts[:, slot] == expert).flatten()  # (N,)
            one, two, three = (weight.select(expert) for weight in (w1, w2, w3))
            inputs = x[rows].float()  # (N, D)
            hidden = F.silu(quantized_linear(inputs, one)) * quantized_linear(inputs, three)
            y[rows] += weights[rows, slot, None] * quantized_linear(hidden, two)  # (N, D)
    return y.to(x.dtype)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[target], in fp32, as a scalar.

    hidden (T, D), weight (V, D), targets (T,) int64; tokens with target -100 do not count.
    """
    logits = (hidden @ weight.t()).float()  # (T, V)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def is_finite(x: Tensor) -> bool:
    """Whether no number of x, of any shape and float, is NaN or infinite."""
    if not x.numel():
        return True
    low, high = x.aminmax()  # one pass, no memory; NaN wins over every number
    return bool(low.isfinite() and high.isfinite())
