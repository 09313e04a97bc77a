"""The sparse part of a model: how many experts, which router chooses them, in which layout.

Each router has options of its own, a frozen dataclass below; ROUTERS is the list of them. They are
explained, with sources, in docs/training.md.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from tramontane.config.fields import build_config, require_positive, require_within
from tramontane.errors import ConfigError

Shapes = Mapping[str, tuple[str, ...]]  # tensors by name, their dimensions as fields of the model


@dataclass(frozen=True)
class RouterOptions:
    """What a router needs beside the numbers of experts: of top_k, nothing.

    `experts_per_tok` is the only number it is defined for (None: any). `parameters` and `buffers`
    are what it keeps beside its weight. `why_not_causal` says how it would show a token later ones.
    """

    experts_per_tok: ClassVar[int | None] = None
    parameters: ClassVar[Shapes] = {}
    buffers: ClassVar[Shapes] = {}
    why_not_causal: ClassVar[str] = ""


@dataclass(frozen=True)
class BiasedTopKOptions(RouterOptions):
    """Top-k by logits plus a bias per expert, which training moves (arXiv:2408.15664)."""

    buffers: ClassVar[Shapes] = {"expert_bias": ("num_experts",)}


@dataclass(frozen=True)
class CapacityOptions(RouterOptions):
    """An expert takes at most factor * tokens / experts, in training and elsewhere; 0: any number.

    Without a limit outside of training no token's result depends on what shares its batch.
    """

    capacity_factor: float = 1.25
    eval_capacity_factor: float = 0.0

    def __post_init__(self) -> None:
        require_within(self, "capacity_factor", 0)
        require_within(self, "eval_capacity_factor", 0)


@dataclass(frozen=True)
class SwitchOptions(CapacityOptions):
    """Switch: in training the gate's input is multiplied by 1 - jitter to 1 + jitter."""

    experts_per_tok: ClassVar[int | None] = 1
    jitter: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(self, "jitter", 0, 1)


@dataclass(frozen=True)
class NoisyTopKOptions(RouterOptions):
    """Shazeer's: learnt noise on the logits, in training."""

    parameters: ClassVar[Shapes] = {"noise_weight": ("num_experts", "dim")}


@dataclass(frozen=True)
class StMoeOptions(CapacityOptions):
    """ST-MoE: the second expert is taken with probability weight / threshold, at most 1."""

    experts_per_tok: ClassVar[int | None] = 2
    threshold: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(self, "threshold", 0, 1)


@dataclass(frozen=True)
class GShardOptions(StMoeOptions):
    """GShard: probability 2 * weight, and twice the even share of tokens."""

    threshold: float = 0.5
    capacity_factor: float = 2.0


@dataclass(frozen=True)
class SparseMixerOptions(RouterOptions):
    """SparseMixer: experts whose logit is further than 2 * eps below the largest are not drawn."""

    experts_per_tok: ClassVar[int | None] = 1
    parameters: ClassVar[Shapes] = {"omega": ("dim",)}
    eps: float = 0.1

    def __post_init__(self) -> None:
        require_within(self, "eps", 0)


@dataclass(frozen=True)
class SparseMixerV2Options(SparseMixerOptions):
    """SparseMixer of two experts, as in GRIN and Phi-3.5-MoE."""

    experts_per_tok: ClassVar[int | None] = 2
    parameters: ClassVar[Shapes] = {}


@dataclass(frozen=True)
class TopPOptions(RouterOptions):
    """As many experts as have a probability of `top_p` together, at most num_experts_per_tok."""

    top_p: float = 0.4

    def __post_init__(self) -> None:
        require_positive(self, "top_p")
        require_within(self, "top_p", 0, 1)


@dataclass(frozen=True)
class ExpertChoiceOptions(RouterOptions):
    """Each expert takes its capacity_factor * tokens / experts best tokens.

    With `normalize` the weights of a token sum to 1 (sparse upcycling of vision models).
    """

    why_not_causal: ClassVar[str] = (
        "an expert chooses among all tokens, so whether it sees one depends on later ones"
    )
    capacity_factor: float = 2.0
    normalize: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "capacity_factor")
        require_bool(self, "normalize")


@dataclass(frozen=True)
class SoftOptions(RouterOptions):
    """Soft MoE: each expert has slots that are mixtures of all tokens."""

    why_not_causal: ClassVar[str] = (
        "each slot is a mixture of all tokens of a sequence, so a token would see later ones"
    )
    slots_per_expert: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "slots_per_expert")


ROUTERS: dict[str, type[RouterOptions]] = {
    "top_k": RouterOptions,
    "biased_top_k": BiasedTopKOptions,
    "switch": SwitchOptions,
    "noisy_top_k": NoisyTopKOptions,
    "gshard": GShardOptions,
    "st_moe": StMoeOptions,
    "sparse_mixer": SparseMixerOptions,
    "sparse_mixer_v2": SparseMixerV2Options,
    "top_p": TopPOptions,
    "expert_choice": ExpertChoiceOptions,
    "soft": SoftOptions,
}
# What the residual layout (arXiv:2201.05596) has beside the experts: a dense network and a mixer.
RESIDUAL: Shapes = {
    "residual.w1.weight": ("hidden_dim", "dim"),
    "residual.w2.weight": ("dim", "hidden_dim"),
    "residual.w3.weight": ("hidden_dim", "dim"),
    "mix.weight": ("2", "dim"),
    "mix.bias": ("2",),
}


@dataclass(frozen=True)
class MoeConfig:
    """The sparse feed-forward part: `num_experts_per_tok` of `num_experts` see each token.

    `router_options` are those of `router`; None stands for its defaults. `residual` puts a dense
    network beside the experts, and `layer_experts` gives each layer a number of its own, a
    pyramid, of which `num_experts` is the largest (both arXiv:2201.05596). A layer of one expert is
    a dense one: beside `top_k` layers its router has nothing to choose.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    router: str = "top_k"
    router_options: RouterOptions | None = None
    residual: bool = False
    layer_experts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "num_experts_per_tok")
        require_bool(self, "residual")
        if not isinstance(self.router, str) or self.router not in ROUTERS:
            raise ConfigError(f"moe.router is {self.router!r}; choose one of {list(ROUTERS)}")
        if self.router_options is None:
            object.__setattr__(self, "router_options", ROUTERS[self.router]())
        if type(self.router_options) is not ROUTERS[self.router]:
            raise ConfigError(
                f"moe.router_options are {self.router_options!r:.80}, which are not those of the "
                f"router {self.router!r}"
            )
        self._check_counts()

    def _check_counts(self) -> None:
        fewest, source = self.num_experts, "moe.num_experts"
        if not isinstance(self.layer_experts, tuple):
            raise ConfigError(f"moe.layer_experts is {self.layer_experts!r}; list one per layer")
        if self.layer_experts:
            if any(type(count) is not int or count < 1 for count in self.layer_experts):
                raise ConfigError(f"moe.layer_experts are {self.layer_experts}; they count experts")
            if max(self.layer_experts) != self.num_experts:
                raise ConfigError(
                    f"moe.num_experts is {self.num_experts}; it must be the largest of "
                    f"moe.layer_experts, {max(self.layer_experts)}"
                )
            self._check_dense_layers()
            fewest, source = self.fewest_experts, "the least of moe.layer_experts"
        if self.num_experts_per_tok > fewest:
            raise ConfigError(
                f"moe.num_experts_per_tok is {self.num_experts_per_tok}, but there are only "
                f"{fewest} experts ({source})"
            )
        wanted = self.options.experts_per_tok
        if wanted is not None and self.num_experts_per_tok != wanted:
            raise ConfigError(
                f"moe.num_experts_per_tok is {self.num_experts_per_tok}; the router "
                f"{self.router!r} is defined for {wanted}"
            )

    def _check_dense_layers(self) -> None:
        if 1 in self.layer_experts and self.num_experts_per_tok > 1 and self.router != "top_k":
            raise ConfigError(
                f"moe.layer_experts are {self.layer_experts}: beside layers that use "
                f"{self.num_experts_per_tok} experts, those of one, dense layers, want the router "
                f"'top_k', not {self.router!r}"
            )

    @property
    def fewest_experts(self) -> int:
        """Of the layers that have a choice: the most that every token can go to."""
        choosing = [count for count in self.layer_experts or (self.num_experts,) if count > 1]
        return min(choosing, default=1)

    @property
    def options(self) -> RouterOptions:
        """`router_options`, which are always there once checked."""
        assert self.router_options is not None
        return self.router_options

    @property
    def is_mixtral(self) -> bool:
        """Whether it is what Mixtral has, and so what others read and run."""
        return self.router == "top_k" and not self.residual and not self.layer_experts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them, without what is as in a Mixtral."""
        values = asdict(self) | {"layer_experts": list(self.layer_experts)}
        plain = {"router": "top_k", "router_options": {}, "residual": False, "layer_experts": []}
        return {key: value for key, value in values.items() if plain.get(key) != value}

    def require_causal(self) -> None:
        """Raise ConfigError, saying why, if the router cannot be that of a causal model."""
        if self.options.why_not_causal:
            causal = [name for name, options in ROUTERS.items() if not options.why_not_causal]
            raise ConfigError(
                f"moe.router is {self.router!r}, which a causal model cannot have: "
                f"{self.options.why_not_causal}; choose one of {causal}"
            )

    def for_layer(self, layer: int) -> "MoeConfig":
        """That of one layer."""
        if not self.layer_experts:
            return self
        count = self.layer_experts[layer]
        num_used = min(count, self.num_experts_per_tok)
        return replace(self, num_experts=count, num_experts_per_tok=num_used, layer_experts=())

    def list_experts(self, n_layers: int) -> tuple[int, ...]:
        """The number of experts of each layer."""
        return self.layer_experts or (self.num_experts,) * n_layers

    def count_experts(self, n_layers: int) -> int:
        """Experts of all layers together."""
        return sum(self.list_experts(n_layers))

    def count_active_experts(self, n_layers: int) -> int:
        """Experts that see a token, of all layers together."""
        return sum(min(self.num_experts_per_tok, n) for n in self.list_experts(n_layers))

    def list_extra_tensors(self) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
        """Parameters and buffers of a sparse layer beside the gate's weight and the experts."""
        parameters = {f"gate.{name}": dims for name, dims in self.options.parameters.items()}
        buffers = {f"gate.{name}": dims for name, dims in self.options.buffers.items()}
        return parameters | (dict(RESIDUAL) if self.residual else {}), buffers


def require_bool(config: Any, name: str) -> None:
    """Raise ConfigError unless a field is true or false."""
    if not isinstance(value := getattr(config, name), bool):
        raise ConfigError(f"{name} is {value!r}; it must be true or false")


def build_moe_config(values: Any) -> MoeConfig:
    """From plain values, as `to_dict` gives them; what is unknown, missing or odd is a ConfigError.

    A file may leave out what is as in a Mixtral.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"moe is {values!r}; it must be an object")
    values = dict(values)
    router = values.get("router", MoeConfig.router)
    options = values.get("router_options")
    if isinstance(options, dict) and isinstance(router, str) and router in ROUTERS:
        where = f"moe.router_options of {router!r}"
        values["router_options"] = build_config(ROUTERS[router], options, where=where)
    if isinstance(values.get("layer_experts"), list):
        values["layer_experts"] = tuple(values["layer_experts"])
    config: MoeConfig = build_config(MoeConfig, values, where="moe")
    return config
