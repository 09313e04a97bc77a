"""A router by its name in the configuration."""

from tramontane.config import ModelConfig, MoeConfig
from tramontane.errors import ConfigError
from tramontane.nn.router import Router, TopKRouter
from tramontane.nn.routers.biased_top_k import BiasedTopKRouter
from tramontane.nn.routers.expert_choice import ExpertChoiceRouter
from tramontane.nn.routers.noisy_top_k import NoisyTopKRouter
from tramontane.nn.routers.second_expert import SecondExpertRouter
from tramontane.nn.routers.sparse_mixer import SparseMixerRouter, SparseMixerV2Router
from tramontane.nn.routers.switch import SwitchRouter
from tramontane.nn.routers.top_p import TopPRouter

_CLASSES: dict[str, type[Router]] = {
    "top_k": TopKRouter,
    "biased_top_k": BiasedTopKRouter,
    "switch": SwitchRouter,
    "noisy_top_k": NoisyTopKRouter,
    "gshard": SecondExpertRouter,
    "st_moe": SecondExpertRouter,
    "sparse_mixer": SparseMixerRouter,
    "sparse_mixer_v2": SparseMixerV2Router,
    "top_p": TopPRouter,
    "expert_choice": ExpertChoiceRouter,
}


def build_router(
    config: ModelConfig, moe: MoeConfig, *, layer: int = 0, causal: bool = True
) -> Router:
    """The router of `moe` for one layer. Raises ConfigError if `causal` and it cannot be."""
    if causal:
        moe.require_causal()
    if moe.router not in _CLASSES:
        raise ConfigError(
            f"{moe.router!r} is not a router but a layer of its own; build nn.soft_moe.SoftMoe"
        )
    return _CLASSES[moe.router](config, moe, layer=layer)
