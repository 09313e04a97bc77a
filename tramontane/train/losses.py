"""What training minimises: next-token cross-entropy, and the terms that keep a router healthy."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tramontane.data.packing import PackedBatch
from tramontane.kernels.dispatch import get_kernels
from tramontane.models.transformer import Transformer
from tramontane.nn.router import Routing

Convention = Literal["hf", "megablocks"]
CONVENTIONS = get_args(Convention)
_HEAD_ROWS = 1024  # tokens whose logits are there at once


class LossTerms(NamedTuple):
    """What a loss function makes of one batch.

    `objective` is a sum over `num_units` units (tokens in pre-training, pairs in tuning), so
    that batches of unequal size add up to the mean over all their units. Where `token_mask` (T,)
    is false there is padding, which routers' terms and loads leave out.
    """

    objective: Tensor
    num_units: int
    routing: tuple[Routing, ...]
    token_mask: Tensor | None = None


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
    routing: Sequence[Routing],
    *,
    loads: Sequence[Tensor] | None = None,
    convention: Convention = "hf",
    mask: Tensor | None = None,
) -> Tensor:
    """Mean over layers of E * sum_e f_e P_e; zero for a dense model, and dense layers are left out.

    P_e is the mean softmax probability of expert e. f_e is, by convention "hf" (transformers), the
    number of slots that it was chosen for per token, so that balanced routing gives K; by
    "megablocks" its share of all chosen slots, so that it gives 1. Choices count before capacity
    drops any. Each layer counts by itself: pooled over layers, as transformers does, the imbalance
    of one layer can hide that of another.

    Only tokens where `mask` (T,) is true count. `loads` are the slots per token (E,) of each layer
    over more tokens than these, of which these are a part.
    """
    if loads is None:
        loads = [compute_load(layer, mask=mask) for layer in routing]
    if convention == "megablocks":
        loads = [load / load.sum().clamp_min(1e-9) for load in loads]
    pairs = zip(routing, loads, strict=True)
    return _mean_of_layers([_balance_layer(*pair, mask) for pair in pairs if len(pair[1]) > 1])


def compute_load(routing: Routing, *, mask: Tensor | None = None) -> Tensor:
    """Slots that each expert is chosen for per token, (E,); the sum is K where all are used."""
    counts = count_tokens_per_expert(routing, mask=mask).to(routing.logits.dtype)
    return counts / max(1, len(_keep_tokens(routing.logits, mask)))


def _balance_layer(routing: Routing, load: Tensor, mask: Tensor | None) -> Tensor:
    probability = _mean(torch.softmax(_keep_tokens(routing.logits, mask), dim=-1))  # (E,)
    return len(load) * (load * probability).sum()


def compute_router_z_loss(routing: Sequence[Routing], *, mask: Tensor | None = None) -> Tensor:
    """Mean over layers and tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906)."""
    logits = _list_logits(routing, mask)
    return _mean_of_layers([_mean(torch.logsumexp(x, dim=-1).pow(2)) for x in logits])


def compute_router_entropy(routing: Sequence[Routing], *, mask: Tensor | None = None) -> Tensor:
    """Mean over layers and tokens of the entropy of the softmax over all experts, in nats.

    The "dynamic loss" of top-p routing (arXiv:2403.07652), which keeps its experts few.
    """
    log_probs = [torch.log_softmax(logits, dim=-1) for logits in _list_logits(routing, mask)]
    return _mean_of_layers([_mean(-(x.exp() * x).sum(-1)) for x in log_probs])


def list_choices(routing: Routing) -> Tensor:
    """The experts that were chosen, (T, K), whether capacity then dropped them or not; -1: none."""
    return routing.experts if routing.chosen is None else routing.chosen


def count_tokens_per_expert(routing: Routing, *, mask: Tensor | None = None) -> Tensor:
    """How many slots chose each expert, dropped ones included: (E,) int64."""
    choices = _keep_tokens(list_choices(routing), mask)
    return torch.bincount(choices[choices >= 0], minlength=routing.logits.shape[1])


def _keep_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Those rows of values (T, ...) that are no padding."""
    return values if mask is None else values[mask.to(values.device)]


def _list_logits(routing: Sequence[Routing], mask: Tensor | None) -> list[Tensor]:
    """(T, E) of each layer that has a choice; a layer of one expert is a dense one."""
    return [_keep_tokens(r.logits, mask) for r in routing if r.logits.shape[1] > 1]


def _mean(values: Tensor) -> Tensor:
    """Over the first dimension; zero of none."""
    return values.sum(0) / max(1, len(values))


def _mean_of_layers(terms: Sequence[Tensor]) -> Tensor:
    """Zero for a dense model, which has none."""
    return torch.stack(list(terms)).mean() if terms else torch.zeros(())
