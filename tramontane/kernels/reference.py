"""The specification of every kernel in plain torch: slow, differentiable, obviously right.

Shapes: T tokens, M keys, D dim, F hidden_dim, E experts, K experts per token, H heads, G kv heads,
S head_dim, V vocabulary. Sums that matter are taken in fp32 and cast once, at the end; where the
inputs are float64, as in checks of gradients, everything is.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tramontane.kernels.packing import PackedWeight, dequantize
from tramontane.kernels.sampling import GREEDY_BELOW, draw_token, filter_logits

NO_EXPERT = -1  # in a slot that a token does not use


def widen(x: Tensor) -> Tensor:
    """In fp32, or in float64 if it is that: for sums that matter."""
    return x if x.dtype == torch.float64 else x.float()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: x (..., M), W (N, M), returns (..., N) in the dtype of x."""
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in fp32, cast to the dtype of x (..., D), times weight (D,)."""
    x_float = widen(x)
    inverse_rms = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)
    return (x_float * inverse_rms).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn the pairs (i, i + S/2) of x (T, H, S) by the angles of cos, sin (T, S/2), in fp32.

    Halves, not neighbours, form a pair, as in Hugging Face checkpoints; `checkpoint/` permutes the
    weights of the formats that pair neighbours.
    """
    first, second = widen(x).chunk(2, dim=-1)  # (T, H, S/2) each
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
    scores = widen(scores).masked_fill(hidden, float("-inf"))
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
    """`causal_attention` of B sequences whose keys and values lie in blocks of pools.

    q (T, H, S), T = sum(num_queries); pools (num_blocks, G, block_size, S); int64 block_tables
    (B, N), num_queries and num_keys (B,); returns (T, H, S). Position p of sequence b is in block
    block_tables[b, p // block_size]; blocks wholly before the window of the first query are not
    read.
    """
    parts = split_pages(q, key_pool, value_pool, block_tables, num_queries, num_keys, window=window)
    return torch.cat([causal_attention(*part, window=window) for part in parts])


def split_pages(
    q: Tensor,
    key_pool: Tensor,
    value_pool: Tensor,
    block_tables: Tensor,
    num_queries: Tensor,
    num_keys: Tensor,
    *,
    window: int | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each sequence of `paged_attention` its q and the k, v (G, M, S) that it may read."""
    block_size, seqlens = key_pool.shape[2], num_queries.tolist()
    assert sum(seqlens) == len(q), (seqlens, q.shape)
    queries = q.split(seqlens)
    for i, (seqlen, end) in enumerate(zip(seqlens, num_keys.tolist(), strict=True)):
        first = 0 if window is None else max(0, end - seqlen + 1 - window) // block_size
        blocks = block_tables[i, first : -(-end // block_size)]
        k, v = (
            pool[blocks].transpose(0, 1).flatten(1, 2)[:, : end - first * block_size]
            for pool in (key_pool, value_pool)
        )
        yield queries[i], k, v


def store_paged(k: Tensor, v: Tensor, key_pool: Tensor, value_pool: Tensor, slots: Tensor) -> None:
    """Write k and v (T, G, S) into pools as in `paged_attention`.

    Token t goes to slots[t] = block * block_size + place in the block, int64 (T,).
    """
    blocks, places = slots // key_pool.shape[2], slots % key_pool.shape[2]
    key_pool[blocks, :, places] = k
    value_pool[blocks, :, places] = v


def top_k_routing(
    logits: Tensor, num_experts_per_tok: int, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the K largest of the logits (T, E); weights are their softmax (arXiv:2401.04088).

    Returns fp32 weights (T, K) in falling order and int64 experts (T, K). Of equal logits the lower
    expert index comes first, which `torch.topk` alone does not promise. Token t has only counts[t]
    experts, 1 .. K, where int64 counts (T,) are given: its other slots hold weight 0, expert -1.
    """
    ordered, experts = torch.sort(widen(logits), dim=-1, descending=True, stable=True)
    ordered, experts = ordered[:, :num_experts_per_tok], experts[:, :num_experts_per_tok]
    if counts is None:
        return torch.softmax(ordered, dim=-1), experts
    check_counts(counts, *ordered.shape)
    weights, chosen = torch.zeros_like(ordered), torch.full_like(experts, NO_EXPERT)
    for count in counts.unique().tolist():  # each as if it were everybody's, to the bit
        rows = counts == count
        weights[rows, :count] = torch.softmax(ordered[rows, :count], dim=-1)
        chosen[rows, :count] = experts[rows, :count]
    return weights, chosen


def top_k_router(
    x: Tensor, weight: Tensor, num_experts_per_tok: int, counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mixtral's router, x (T, D) and weight (E, D): weights and experts (T, K), logits (T, E).

    The product is in the dtype of x, the rest in fp32; see `top_k_routing`.
    """
    logits = widen(linear(x, weight))
    weights, experts = top_k_routing(logits, num_experts_per_tok, counts)
    return weights, experts, logits


def check_counts(counts: Tensor, num_tokens: int, num_experts_per_tok: int) -> None:
    """Assert that every token has a number of experts from 1 to K."""
    assert (counts.dtype, counts.shape) == (torch.int64, (num_tokens,)), counts
    assert ((counts >= 1) & (counts <= num_experts_per_tok)).all(), (counts, num_experts_per_tok)


def check_experts(experts: Tensor, num_experts: int) -> None:
    """Raise IndexError unless each slot holds one of the experts or `NO_EXPERT`."""
    is_known = ((experts >= 0) & (experts < num_experts)) | (experts == NO_EXPERT)
    if not is_known.all():
        raise IndexError(
            f"there is no such expert: {experts[~is_known][0]}; there are {num_experts}"
        )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of equal shapes (arXiv:2002.05202)."""
    return F.silu(gate) * up


def moe_experts(
    x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, w2: Tensor, w3: Tensor
) -> Tensor:
    """y_t = sum_k weights[t, k] * w2_e silu(w1_e x_t) * (w3_e x_t) with e = experts[t, k].

    x (T, D), weights and experts (T, K), w1 and w3 (E, F, D), w2 (E, D, F); returns (T, D) in the
    dtype of x. The sum runs in fp32 over the token's own slots k = 0, 1, ..., not in expert order;
    slots with expert -1 are left out. Raises IndexError on an expert that there is not.
    """
    check_experts(experts, len(w1))
    num_slots = experts.shape[1]
    y = torch.zeros_like(widen(x))
    for slot in range(num_slots):
        out = torch.zeros_like(x)
        for expert in range(w1.shape[0]):
            rows = torch.nonzero(experts[:, slot] == expert).flatten()  # (N,)
            hidden = F.silu(x[rows] @ w1[expert].t()) * (x[rows] @ w3[expert].t())  # (N, F)
            out = out.index_put((rows,), hidden @ w2[expert].t())
        y = y + weights[:, slot, None] * widen(out)
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
    check_experts(experts, len(w1.qweight))
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for slot in range(experts.shape[1]):
        chosen = experts[:, slot]
        for expert in chosen[chosen != NO_EXPERT].unique().tolist():
            rows = torch.nonzero(chosen == expert).flatten()  # (N,)
            one, two, three = (weight.select(expert) for weight in (w1, w2, w3))
            inputs = x[rows].float()  # (N, D)
            hidden = F.silu(quantized_linear(inputs, one)) * quantized_linear(inputs, three)
            y[rows] += weights[rows, slot, None] * quantized_linear(hidden, two)  # (N, D)
    return y.to(x.dtype)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(hidden weight^T)[target], in fp32, as a scalar.

    hidden (T, D), weight (V, D), targets (T,) int64; tokens with target -100 do not count.
    """
    logits = widen(hidden @ weight.t())  # (T, V)
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    numbers: Tensor,
) -> Tensor:
    """The next token of each row of logits (R, V) fp32, as its own settings (R,) say.

    temperature, top_p, min_p fp32, top_k int64: below a temperature of 1e-5 the best; else the
    filters of `sampling.py` in the order temperature, top-k (0 and less: off), top-p (1: off),
    min-p (0: off), and what the chances give for numbers (R,) fp64 from [0, 1). Returns int64 (R,);
    a row of NaN gives some id.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    columns = [column.tolist() for column in (temperature, top_k, top_p, min_p, numbers)]
    for r, (heat, k, p, least, number) in enumerate(zip(*columns, strict=True)):
        if heat < GREEDY_BELOW:
            tokens[r] = logits[r].argmax()
        else:
            kept = filter_logits(logits[r], temperature=heat, top_k=k, top_p=p, min_p=least)
            tokens[r] = draw_token(torch.softmax(kept, dim=0), number)
    return tokens


def is_finite(x: Tensor) -> bool:
    """Whether no number of x, of any shape and float, is NaN or infinite."""
    if not x.numel():
        return True
    low, high = x.aminmax()  # one pass, no memory; NaN wins over every number
    return bool(low.isfinite() and high.isfinite())
