"""One layer of experts, forward and backward: what an uneven load costs, and what others do.

`grouped` is ours: rows sorted by expert, none dropped. `loop` goes over the experts as
mistral-inference and transformers' eager experts do. `padded` is the layout of GShard and Switch:
each expert has room for capacity factor * K * T / E rows, computes on all of them, and drops what
does not fit; to drop nothing under any load it needs room for all tokens.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tramontane.config import ModelConfig
from tramontane.kernels.dispatch import get_kernels


class Layer(NamedTuple):
    """Inputs and weights of one layer, all of them with gradients but `experts`."""

    x: Tensor  # (T, D)
    weights: Tensor  # (T, K)
    experts: Tensor  # (T, K) int64
    w1: Tensor  # (E, F, D)
    w2: Tensor  # (E, D, F)
    w3: Tensor  # (E, F, D)


Run = Callable[[Layer], Tensor]


def run_grouped(layer: Layer) -> Tensor:
    y: Tensor = get_kernels().moe_experts(*layer)
    return y


def run_loop(layer: Layer) -> Tensor:
    x, weights, experts, w1, w2, w3 = layer
    y = torch.zeros(x.shape, dtype=torch.float32)
    for e in range(len(w1)):
        token, slot = torch.where(experts == e)
        rows = x[token]
        out = (F.silu(rows @ w1[e].t()) * (rows @ w3[e].t())) @ w2[e].t()
        y = y.index_add(0, token, weights[token, slot, None] * out.float())
    return y.to(x.dtype)


def run_padded(layer: Layer, *, factor: float | None) -> Tensor:
    """`factor` None: room for all tokens at each expert, so that none is ever dropped."""
    x, weights, experts, w1, w2, w3 = layer
    num_tokens, num_slots = experts.shape
    room = find_room(num_tokens, num_slots, len(w1), factor=factor)
    place, kept = place_tokens(experts, num_experts=len(w1), room=room)  # (T * K,) each
    token = torch.arange(num_tokens).repeat_interleave(num_slots)
    buffers = x.new_zeros(len(w1) * room, x.shape[1])
    buffers = buffers.index_put((place[kept],), x[token[kept]]).unflatten(0, (len(w1), room))
    hidden = F.silu(torch.bmm(buffers, w1.mT)) * torch.bmm(buffers, w3.mT)  # (E, C, F)
    out = torch.bmm(hidden, w2.mT).flatten(0, 1)  # (E * C, D)
    scaled = weights.flatten()[kept][:, None] * out[place[kept]].float()
    return torch.zeros(x.shape).index_add(0, token[kept], scaled).to(x.dtype)


def find_room(num_tokens: int, num_slots: int, num_experts: int, *, factor: float | None) -> int:
    """Rows of each expert's buffer."""
    if factor is None:
        return num_tokens
    return math.ceil(factor * num_slots * num_tokens / num_experts)


def place_tokens(experts: Tensor, *, num_experts: int, room: int) -> tuple[Tensor, Tensor]:
    """Row of each slot in the buffers, and whether it fits there; earlier tokens go first."""
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(len(flat)) - (counts.cumsum(0) - counts)[flat[order]]
    return flat * room + rank, rank < room


CAPACITIES = {
    "padded, capacity 1.25": 1.25,
    "padded, capacity 2": 2.0,
    "padded, drops nothing": None,
}
RUNS: dict[str, Run] = {"grouped, dropless": run_grouped, "loop over experts": run_loop} | {
    name: partial(run_padded, factor=factor) for name, factor in CAPACITIES.items()
}
LOADS = ("uniform", "all tokens to K experts")


def make_layer(config: ModelConfig, *, num_tokens: int, load: str, dtype: torch.dtype) -> Layer:
    assert config.moe is not None, config
    num_experts, num_slots = config.moe.num_experts, config.moe.num_experts_per_tok
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    slots = torch.arange(num_slots).expand(num_tokens, -1)  # (T, K)
    if load == "uniform":  # each expert takes as many, at random places
        start = torch.randperm(num_tokens, generator=generator)[:, None] * num_slots
        slots = (start + slots) % num_experts
    weights = torch.full(slots.shape, 1 / num_slots).requires_grad_()
    w1, w3 = (draw(num_experts, config.hidden_dim, config.dim) for _ in range(2))
    w2 = draw(num_experts, config.dim, config.hidden_dim)
    return Layer(draw(num_tokens, config.dim), weights, slots, w1, w2, w3)


def measure_layers(
    config: ModelConfig, *, num_tokens: int, dtype: torch.dtype, repeats: int
) -> dict[tuple[str, str], float]:
    """Median seconds of forward and backward by (run, load); all take their turn in each round."""
    layers = {
        load: make_layer(config, num_tokens=num_tokens, load=load, dtype=dtype) for load in LOADS
    }
    for load, layer in layers.items():
        _require_agreement(load, layer)
    times: dict[tuple[str, str], list[float]] = {(run, load): [] for run in RUNS for load in LOADS}
    for _ in range(repeats + 1):  # the first compiles
        for (run, load), seconds in times.items():
            seconds.append(_time_pass(RUNS[run], layers[load]))
    return {key: statistics.median(seconds[1:]) for key, seconds in times.items()}


def _require_agreement(load: str, layer: Layer) -> None:
    """Those that drop nothing compute the same."""
    expected = run_grouped(layer).detach()
    for name in ("loop over experts", "padded, drops nothing"):
        error = (RUNS[name](layer).detach() - expected).norm() / expected.norm()
        if not error < 0.02:  # in bf16
            raise SystemExit(f"{name}, {load}: differs from grouped by {error:.1%}")


def _time_pass(run: Run, layer: Layer) -> float:
    started = time.perf_counter()
    run(layer).sum().backward()
    seconds = time.perf_counter() - started
    for tensor in layer:
        tensor.grad = None
    return seconds


def count_dropped(config: ModelConfig, run: str, load: str, *, num_tokens: int) -> float:
    """Share of the slots that the run drops under the load."""
    factor = CAPACITIES.get(run)
    if factor is None:
        return 0.0
    layer = make_layer(config, num_tokens=num_tokens, load=load, dtype=torch.float32)
    num_experts = len(layer.w1)
    room = find_room(*layer.experts.shape, num_experts, factor=factor)
    _, kept = place_tokens(layer.experts, num_experts=num_experts, room=room)
    return 1 - kept.float().mean().item()
