"""Sparse upcycling: a dense model into a mixture of experts that computes the same.

Each expert is a copy of the dense network (arXiv:2212.05055). Mixtral's weights sum to one, so
sum_k w_k f(x) = f(x) whatever the router chooses. With virtual groups (arXiv:2410.07524) an expert
is a shard of the hidden units, and the shards of one network have one score between them, so that
top-k takes all of them or none: their sum, times their number, is f(x) again. Layers that are not
chosen stay dense: they get one expert.
"""

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from tramontane.checkpoint.parameters import Parameters
from tramontane.config import ModelConfig, MoeConfig, require_positive
from tramontane.errors import ConfigError
from tramontane.models.transformer import build_model
from tramontane.nn.attention import PackedSequences
from tramontane.nn.rope import compute_rope

ROUTER_STD = 0.02  # of normal and uniform routers: that of a new model
_EXPERT = re.compile(r"(layers\.(\d+)\.feed_forward)\.experts\.(w[123])")
_GATE = re.compile(r"layers\.(\d+)\.feed_forward\.gate\.weight")
_RULE = re.compile(r"(every|last)-(\d+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class UpcycleOptions:
    """What becomes of each feed-forward network.

    `virtual_groups` G cuts a network into G shards of its hidden units; there are num_experts / G
    copies of each. `noise` is the deviation of what is added to each copy, as a share of the
    matrix's own root mean square; the start is then no longer exact. `layers` are those that get
    experts, see `list_layers`.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    layers: str = "all"
    router_init: Literal["normal", "zeros", "uniform"] = "normal"
    noise: float = 0.0
    virtual_groups: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "num_experts_per_tok", "virtual_groups")
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"noise is {self.noise}; it must be zero or above")
        if self.router_init not in ("normal", "zeros", "uniform"):
            raise ConfigError(
                f"router_init is {self.router_init!r}; choose normal, zeros or uniform"
            )
        for name in ("num_experts", "num_experts_per_tok"):
            value = getattr(self, name)
            if value % self.virtual_groups:
                raise ConfigError(
                    f"{name} is {value}, no multiple of virtual_groups, {self.virtual_groups}: a "
                    "token has to take all shards of a network, or the start is another function"
                )


def list_layers(text: str, n_layers: int) -> list[int]:
    """The layers that "all", "every-2" (1, 3, 5, ...), "last-4" or "0,2,5-7" stand for, sorted.

    Raises ConfigError on anything else, and on layers that there are not.
    """
    layers = range(n_layers)
    if text == "all":
        return list(layers)
    wanted = f"layers is {text!r}; choose all, every-2, last-4, or numbers such as 0,2,5-7"
    outside = f"layers is {text!r}, but the model has {n_layers} layers, 0 to {n_layers - 1}"
    if rule := _RULE.fullmatch(text):
        count = int(rule[2])
        if not 1 <= count <= n_layers:
            raise ConfigError(outside if count else wanted)
        return list(layers[count - 1 :: count] if rule[1] == "every" else layers[-count:])
    chosen: set[int] = set()
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise ConfigError(wanted)
        first, last = int(found[1]), int(found[2] or found[1])
        if first > last:
            raise ConfigError(wanted)
        if last >= n_layers:
            raise ConfigError(outside)
        chosen |= set(range(first, last + 1))
    return sorted(chosen)


def plan_upcycled(dense: ModelConfig, options: UpcycleOptions) -> ModelConfig:
    """What the dense model becomes. Raises ConfigError if it cannot."""
    if dense.moe is not None:
        raise ConfigError(
            f"the model is a mixture of {dense.moe.num_experts} experts already; upcycling starts "
            "from a dense one"
        )
    if dense.hidden_dim % options.virtual_groups:
        raise ConfigError(
            f"hidden_dim is {dense.hidden_dim}, no multiple of virtual_groups, "
            f"{options.virtual_groups}"
        )
    chosen = list_layers(options.layers, dense.n_layers)
    if len(chosen) < dense.n_layers and options.virtual_groups > 1:
        raise ConfigError(
            f"layers is {options.layers!r} and virtual_groups is {options.virtual_groups}: dense "
            "layers would need networks of another size than the shards; leave one of them out"
        )
    counts = tuple(options.num_experts if n in chosen else 1 for n in range(dense.n_layers))
    moe = MoeConfig(
        num_experts=options.num_experts,
        num_experts_per_tok=options.num_experts_per_tok,
        layer_experts=() if len(chosen) == dense.n_layers else counts,
    )
    return replace(dense, hidden_dim=dense.hidden_dim // options.virtual_groups, moe=moe)


class UpcycledParameters:
    """Those of the mixture of experts, made from the dense model's as they are asked for."""

    def __init__(self, dense: Parameters, config: ModelConfig, options: UpcycleOptions) -> None:
        """`config` is the dense model's."""
        self._dense, self._config, self._options = dense, config, options
        self._sparse_layers = set(list_layers(options.layers, config.n_layers))
        self._last: tuple[str, Tensor] = ("", torch.empty(0))  # each matrix is asked for E times

    def read(self, parameter: str, expert: int | None = None) -> Tensor:
        """See `checkpoint.parameters.Parameters`."""
        if match := _GATE.fullmatch(parameter):
            is_sparse = int(match[1]) in self._sparse_layers
            return self._make_gate(parameter) if is_sparse else torch.zeros(1, self._config.dim)
        match = _EXPERT.fullmatch(parameter)
        if match is None:
            return self._dense.read(parameter)
        network, layer, matrix = match.groups()
        is_sparse = int(layer) in self._sparse_layers
        if expert is None:
            experts = range(self._options.num_experts if is_sparse else 1)
            return torch.stack([self.read(parameter, e) for e in experts])
        name = f"{network}.{matrix}.weight"
        return self._make_expert(name, matrix, expert) if is_sparse else self._dense.read(name)

    def _make_gate(self, name: str) -> Tensor:
        """(E, D): a row for each copy of the network, repeated for its shards, which lie together.

        Equal rows give equal logits, and of equal ones the first win: shards are taken as a whole.
        """
        options = self._options
        gate = torch.zeros(options.num_experts // options.virtual_groups, self._config.dim)
        bound = ROUTER_STD * 3**0.5
        if options.router_init == "normal":
            gate.normal_(0.0, ROUTER_STD, generator=self._seed(name))
        elif options.router_init == "uniform":
            gate.uniform_(-bound, bound, generator=self._seed(name))
        return gate.repeat_interleave(options.virtual_groups, dim=0)

    def _make_expert(self, name: str, matrix: str, expert: int) -> Tensor:
        """w1 and w3 (F, D), w2 (D, F): a shard of the dense one, w2 times the number of shards."""
        if self._last[0] != name:
            self._last = (name, self._dense.read(name))
        options, weight = self._options, self._last[1]
        count = options.virtual_groups
        shard = weight.chunk(count, dim=1 if matrix == "w2" else 0)[expert % count]
        if matrix == "w2" and count > 1:
            shard = shard * count
        if options.noise == 0:
            return shard
        size = options.noise * shard.float().pow(2).mean().sqrt()
        noise = torch.empty(shard.shape).normal_(generator=self._seed(f"{name}.{expert}"))
        return (shard + size * noise).to(shard.dtype)

    def _seed(self, name: str) -> torch.Generator:
        """A generator of its own for each tensor: their order plays no part."""
        word = zlib.crc32(f"{self._options.seed}.{name}".encode())  # torch reads 32 bits of a seed
        return torch.Generator().manual_seed(word)


@torch.no_grad()
def compute_layered_logits(
    parameters: Parameters, config: ModelConfig, prompts: Sequence[Tensor]
) -> Tensor:
    """Logits (T, V) in fp32 of prompts, (T,) together, with one layer at a time in memory."""
    model = build_model(config, device="meta").eval()
    tokens = torch.cat(list(prompts))
    seqlens = [len(prompt) for prompt in prompts]
    positions = torch.cat([torch.arange(n) for n in seqlens])
    rope = compute_rope(positions, head_dim=config.head_dim, theta=config.rope_theta)
    state = PackedSequences(seqlens)
    x = parameters.read("tok_embeddings.weight")[tokens].float()
    for number, layer in enumerate(model.layers):
        _fill(layer, parameters, f"layers.{number}.")
        x, _ = layer(x, rope, state)
        layer.to("meta")
    _fill(model.norm, parameters, "norm.")
    head = "tok_embeddings.weight" if config.tie_embeddings else "output.weight"
    logits: Tensor = model.norm(x) @ parameters.read(head).float().t()
    return logits


def _fill(module: torch.nn.Module, parameters: Parameters, prefix: str) -> None:
    names = module.state_dict().keys()
    values = {name: parameters.read(prefix + name).float() for name in names}
    module.load_state_dict(values, assign=True)


def make_prompts(vocab_size: int, *, count: int = 4, length: int = 32) -> list[Tensor]:
    """Fixed prompts of random ids, spread over the vocabulary: any model can be asked them."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(vocab_size, (count, length), generator=generator))
