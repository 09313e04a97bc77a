"""What training minimises: next-token cross-entropy, and the terms that keep a router healthy."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tramontane.data.packing import PackedBatch
from tramontane.kernels.dispatch import get_kernels
from tramontane.models.transformer import Transformer
from tramontane.nn.router import Routing

_HEAD_ROWS = 1024  # tokens whose logits are there at once


class LossTerms(NamedTuple):
    """What a loss function makes of one batch.

    `objective` is a sum over `num_units` units (tokens in pre-training, pairs in tuning), so
    that batches of unequal size add up to the mean over all their units.
    """

    objective: Tensor
    num_units: int
    routing: tuple[Routing, ...]


def compute_next_token_loss(model: Transformer, batch: PackedBatch) -> LossTerms:
    """Cross-entropy in nats of each counted target, given its own segment up to it."""
    device = model.norm.weight.device
    tokens = torch.from_numpy(batch.tokens).to(device)
    targets = torch.from_numpy(batch.targets).to(device)
    hidden, routing = model.forward_packed(tokens, batch.seqlens)
    if isinstance(model.output, nn.Linear):
        objective = get_kernels().linear_cross_entropy(hidden, model.output.weight, targets)
    else:
        objective = _sum_cross_entropy(model, hidden, targets)
    return LossTerms(objective, int((batch.targets != -100).sum()), routing)


def _sum_cross_entropy(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same for a head that has no plain weight, a quantised one, which is scored as it runs."""
    blocks = zip(hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True)
    losses = [
        F.cross_entropy(model.compute_logits(h), t, ignore_index=-100, reduction="sum")
        for h, t in blocks
    ]
    return torch.stack(losses).sum()


def compute_load_balancing_loss(
    routing: Sequence[Routing], *, loads: Sequence[Tensor] | None = None
) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e; zero for a dense model.

    f_e is the number of slots that expert e takes per token, P_e its mean softmax probability. Each
    layer counts by itself: pooled over layers, as transformers does, the imbalance of one layer can
    hide that of another. The scale is that of transformers: balanced routing gives K, not 1.
    `loads` are the f (E,) of each layer over more tokens than these, of which these are a part.
    """
    if loads is None:
        loads = [compute_load(layer) for layer in routing]
    terms = [_balance_layer(*pair) for pair in zip(routing, loads, strict=True)]
    return torch.stack(terms).mean() if terms else torch.zeros(())


def compute_load(routing: Routing) -> Tensor:
    """Slots that each expert takes per token, (E,); the sum is K."""
    return count_tokens_per_expert(routing) / max(1, len(routing.logits))


def _balance_layer(routing: Routing, load: Tensor) -> Tensor:
    probability = torch.softmax(routing.logits, dim=-1).mean(0)  # (E,)
    return len(load) * (load * probability).sum()


def compute_router_z_loss(routing: Sequence[Routing]) -> Tensor:
    """Mean over layers and tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906)."""
    terms = [torch.logsumexp(layer.logits, dim=-1).pow(2).mean() for layer in routing]
    return torch.stack(terms).mean() if terms else torch.zeros(())


def count_tokens_per_expert(routing: Routing) -> Tensor:
    """How many slots each expert takes: (E,) int64, sum T * K."""
    return torch.bincount(routing.experts.flatten(), minlength=routing.logits.shape[1])
