"""Was one model made from another? Their weights tell, also after training and in another order.

A hidden unit of a SwiGLU network is a row of w1, a row of w3 and a column of w2. Units of one
network are looked for among those of the other: directions of random vectors are nearly orthogonal
in many dimensions, so a similarity far above chance is no coincidence. Experts and units may have
been permuted, units scaled, and w3 and w2 have changed their sign together, which changes nothing.
"""

from collections import Counter
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tramontane.checkpoint.parameters import Parameters
from tramontane.config import ModelConfig

Verdict = Literal["derived", "partly derived", "independent", "unclear"]

# Shares of the way from chance to identity: a copy that training has moved far is still above the
# first (tests/eval/test_ancestry.py), independent models stay below the second.
DERIVED, INDEPENDENT = 0.4, 0.1
NUM_UNITS = 128  # of each network, as a sample


class ModelWeights(NamedTuple):
    """A model by its parameters, which are read one at a time."""

    parameters: Parameters
    config: ModelConfig

    @property
    def num_experts(self) -> int:
        """Networks in a layer, the most; 1 if dense."""
        return self.config.moe.num_experts if self.config.moe else 1

    def count_experts(self, layer: int) -> int:
        """Networks in one layer."""
        return self.config.moe.for_layer(layer).num_experts if self.config.moe else 1

    def read_units(self, layer: int, expert: int) -> Tensor:
        """The hidden units of a network as unit vectors (F, 3, D): w1, w3, w2."""
        prefix = f"layers.{layer}.feed_forward"
        if self.config.moe is None:
            read = [self.parameters.read(f"{prefix}.{w}.weight") for w in ("w1", "w3", "w2")]
        else:
            read = [
                self.parameters.read(f"{prefix}.experts.{w}", expert) for w in ("w1", "w3", "w2")
            ]
        w1, w3, w2 = (weight.float() for weight in read)
        return F.normalize(torch.stack((w1, w3, w2.t()), dim=1), dim=-1)

    def _read_matrix(self, layer: int, expert: int, matrix: str) -> Tensor:
        prefix = f"layers.{layer}.feed_forward"
        if self.config.moe is None:
            return self.parameters.read(f"{prefix}.{matrix}.weight")
        return self.parameters.read(f"{prefix}.experts.{matrix}", expert)


@dataclass(frozen=True)
class ExpertMatch:
    """A network of one model, and the most similar one, `partner`, in that layer of the other.

    `similarity` is the mean cosine of matched units; `in_order` the share of them that lie as far
    from one another as most do: 1 if the units have kept their order.
    """

    layer: int
    expert: int
    partner: int
    similarity: float
    in_order: float


@dataclass(frozen=True)
class Ancestry:
    """The verdict and what it rests on.

    `experts` are those of the model `looked_for` ("A" or "B"); `attention` is the mean cosine of a
    layer's four matrices, None where shapes differ. `chance` is the similarity of random networks.
    """

    verdict: Verdict
    reason: str
    looked_for: Literal["A", "B"]
    chance: float
    experts: tuple[ExpertMatch, ...]
    attention: tuple[float | None, ...]
    embeddings: float | None


def compare_models(
    a: ModelWeights, b: ModelWeights, *, num_units: int = NUM_UNITS, seed: int = 0
) -> Ancestry:
    """Look for the networks of one model in the other, layer by layer, `num_units` units of each.

    Those with fewer units, which may be shards, are looked for among those with more; else those of
    the model with more experts.
    """
    if a.config.dim != b.config.dim:
        reason = f"dim is {a.config.dim} and {b.config.dim}: no weights of one fit into the other"
        return Ancestry("independent", reason, "B", 0.0, (), (), None)
    is_a_looked_for = (a.config.hidden_dim, -a.num_experts) < (b.config.hidden_dim, -b.num_experts)
    child, parent = (a, b) if is_a_looked_for else (b, a)
    generator = torch.Generator().manual_seed(seed)
    n_layers = min(a.config.n_layers, b.config.n_layers)
    experts = [
        match
        for layer in range(n_layers)
        for match in _match_layer(child, parent, layer, num_units=num_units, generator=generator)
    ]
    attention = [_compare_attention(a, b, layer) for layer in range(n_layers)]
    chance = _simulate_chance(child, parent, num_units=num_units, generator=generator)
    verdict, reason = _judge(experts, attention, chance=chance)
    if a.config.n_layers != b.config.n_layers:
        reason += f" (of {a.config.n_layers} and {b.config.n_layers} layers the first {n_layers})"
    return Ancestry(
        verdict, reason, "A" if is_a_looked_for else "B", chance, tuple(experts),
        tuple(attention), _compare_embeddings(a, b),
    )  # fmt: skip


def _match_layer(
    child: ModelWeights,
    parent: ModelWeights,
    layer: int,
    *,
    num_units: int,
    generator: torch.Generator,
) -> list[ExpertMatch]:
    samples = []
    for expert in range(child.count_experts(layer)):
        units = child.read_units(layer, expert)
        chosen = torch.randperm(len(units), generator=generator)[:num_units]
        samples.append((chosen, units[chosen]))
    best: dict[int, ExpertMatch] = {}
    for partner in range(parent.count_experts(layer)):  # the larger ones are read once each
        units = parent.read_units(layer, partner)
        for expert, (chosen, sample) in enumerate(samples):
            similarity, columns = match_units(compute_similarity(sample, units))
            if expert not in best or similarity > best[expert].similarity:
                in_order = _measure_order(columns - chosen)
                best[expert] = ExpertMatch(layer, expert, partner, similarity, in_order)
    return [best[expert] for expert in range(len(samples))]


def compute_similarity(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean cosine (N, M) of units (N, 3, D) and (M, 3, D), whose w3 and w2 may both be negated."""
    w1, w3, w2 = (ours[:, i] @ theirs[:, i].t() for i in range(3))  # (N, M) each
    return (w1 + (w3 + w2).abs()) / 3


def match_units(similarity: Tensor) -> tuple[float, Tensor]:
    """Give each row of (N, M), N <= M, a column of its own; their mean similarity, and the columns.

    Greedy: the most similar pair goes first, and a row whose column is gone takes its next best.
    """
    left = similarity.clone()
    columns = torch.full((len(left),), -1)
    values, best = left.max(dim=1)
    waiting = values.clone()
    for _ in range(len(left)):
        while True:
            row = int(waiting.argmax())
            if (columns != best[row]).all():
                break
            left[row, best[row]] = -2.0
            waiting[row], best[row] = left[row].max(dim=0)
        columns[row], waiting[row] = best[row], -3.0
    return similarity.gather(1, columns[:, None]).mean().item(), columns


def _measure_order(shifts: Tensor) -> float:
    """The share of the most frequent one."""
    return Counter(shifts.tolist()).most_common(1)[0][1] / len(shifts)


def _simulate_chance(
    child: ModelWeights, parent: ModelWeights, *, num_units: int, generator: torch.Generator
) -> float:
    """What units of random networks have: cosines are normal, with deviation 1 / sqrt(D).

    The best of all experts of the parent is as good as the best of this many units, nearly.
    """
    rows = min(num_units, child.config.hidden_dim)
    shape = (3, rows, parent.config.hidden_dim)
    w1, w3, w2 = torch.randn(shape, generator=generator) * child.config.dim**-0.5
    return match_units((w1 + (w3 + w2).abs()) / 3)[0]


def _compare_attention(a: ModelWeights, b: ModelWeights, layer: int) -> float | None:
    names = [f"layers.{layer}.attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")]
    pairs = [(a.parameters.read(name), b.parameters.read(name)) for name in names]
    if any(ours.shape != theirs.shape for ours, theirs in pairs):
        return None
    return fmean(_compute_cosine(*pair) for pair in pairs)


def _compare_embeddings(a: ModelWeights, b: ModelWeights) -> float | None:
    """Of the tokens that both have; a vocabulary that was extended keeps its beginning."""
    ours, theirs = (m.parameters.read("tok_embeddings.weight") for m in (a, b))
    count = min(len(ours), len(theirs))
    return _compute_cosine(ours[:count], theirs[:count])


def _compute_cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0).item()


def _judge(
    experts: list[ExpertMatch], attention: list[float | None], *, chance: float
) -> tuple[Verdict, str]:
    above = [(match.similarity - chance) / (1 - chance) for match in experts]
    num_alike = sum(share >= DERIVED for share in above)
    found = f"{num_alike} of {len(above)} networks have the other model's units"
    known = [value for value in attention if value is not None]
    is_attention_alike = bool(known) and fmean(known) >= DERIVED
    if num_alike >= len(above) / 2:
        order = fmean(match.in_order for match in experts)
        return "derived", f"{found}, {order:.0%} of them in the same order"
    if num_alike or is_attention_alike:
        return (
            "partly derived",
            f"{found}; attention is {'' if is_attention_alike else 'not '}alike",
        )
    if max(above) <= INDEPENDENT and all(value <= INDEPENDENT for value in known):
        return "independent", "no network and no attention is more alike than chance allows"
    return "unclear", "there is more likeness than chance allows, and less than a copy has"
