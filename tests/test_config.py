"""Model configurations: exact parameter counts, strictness, and Hugging Face's config.json."""

from typing import Any

import pytest
import torch
from transformers import MistralConfig, MixtralConfig

from tests.oracles.hf import to_hf_model
from tests.tiny import make_config, make_model
from tramontane.config import PRESETS, ModelConfig, MoeConfig, get_preset
from tramontane.errors import ConfigError
from tramontane.models.transformer import build_model

MIXTRAL = make_config()
MISTRAL = make_config(moe=None, sliding_window=7, rope_theta=5e5, norm_eps=1e-6)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mixtral-8x7b", 46_702_792_704, 12_879_925_248),
        ("mistral-7b", 7_241_732_096, 7_241_732_096),
    ],
)
def test_parameter_counts_of_presets(name: str, total: int, active: int) -> None:
    count = get_preset(name).count_parameters()
    assert (count.total, count.active) == (total, active)


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(),
        MIXTRAL,
        MISTRAL,
        make_config(tie_embeddings=True),
        make_config(head_dim=6, n_kv_heads=4, n_layers=3),
        make_config(moe=MoeConfig(num_experts=5, num_experts_per_tok=5)),
    ],
)
def test_parameter_count_is_that_of_the_model(config: ModelConfig) -> None:
    parameters = build_model(config, device="meta").parameters()
    assert sum(parameter.numel() for parameter in parameters) == config.count_parameters().total


def test_kv_bytes_of_mixtral() -> None:
    assert get_preset("mixtral-8x7b").count_kv_bytes_per_token() == 131_072


def test_preset_with_changes() -> None:
    assert get_preset("mixtral-8x7b", vocab_size=32002).vocab_size == 32002
    with pytest.raises(ConfigError, match=r"'mixtral-9x7b'.*mixtral-8x7b"):
        get_preset("mixtral-9x7b")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"n_layers": -1}, "n_layers is -1"),
        ({"vocab_size": "128"}, "vocab_size is '128'"),
        ({"dim": True}, "dim is True"),
        ({"dim": 64.5}, "dim is 64.5"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads is 4"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_config(**changes)


@pytest.mark.parametrize(("experts", "chosen"), [(0, 1), (8, 0), (2, 3)])
def test_impossible_experts_are_refused(experts: int, chosen: int) -> None:
    with pytest.raises(ConfigError, match="num_experts"):
        MoeConfig(num_experts=experts, num_experts_per_tok=chosen)


@pytest.mark.parametrize("config", [MIXTRAL, MISTRAL, *PRESETS.values()])
def test_dict_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({**MIXTRAL.to_dict(), "dims": 3}, "dims"),
        ({**MIXTRAL.to_dict(), "moe": {"num_expert": 8}}, r"moe: \['num_expert'\]"),
        ({"dim": 64}, "n_layers"),
    ],
)
def test_unknown_and_missing_keys_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize("config", [MIXTRAL, MISTRAL, make_config(tie_embeddings=True)])
def test_hf_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("config", [MIXTRAL, MISTRAL])
def test_transformers_reads_what_we_write(config: ModelConfig) -> None:
    hf_class = MixtralConfig if config.moe else MistralConfig
    hf_config = hf_class(**config.to_hf())
    assert ModelConfig.from_hf(hf_config.to_dict()) == config
    assert hf_config.rope_parameters["rope_theta"] == config.rope_theta
    assert hf_config.dtype == torch.bfloat16


@pytest.mark.parametrize("config", [MIXTRAL, MISTRAL])
def test_config_of_a_transformers_model_is_read(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(to_hf_model(make_model(config)).config.to_dict()) == config


def test_defaults_of_transformers_are_accepted() -> None:
    mixtral = ModelConfig.from_hf(MixtralConfig().to_dict())
    assert mixtral == get_preset("mixtral-8x7b", max_seq_len=131072)
    mistral = ModelConfig.from_hf(MistralConfig().to_dict())
    assert mistral == get_preset("mistral-7b", max_seq_len=131072, norm_eps=1e-6)


def test_absent_keys_mean_what_transformers_takes_them_for() -> None:
    values = {"model_type": "mistral", "hidden_size": 128, "num_hidden_layers": 2,
              "intermediate_size": 96, "num_attention_heads": 16, "vocab_size": 99,
              "max_position_embeddings": 64}  # fmt: skip
    for extra in ({}, {"num_key_value_heads": 2}, {"sliding_window": None}):
        oracle = MistralConfig(**values, **extra)
        config = ModelConfig.from_hf({**values, **extra})
        assert config == ModelConfig.from_hf(oracle.to_dict())
    assert ModelConfig.from_hf({**values, "num_key_value_heads": None}).n_kv_heads == 16


def test_rope_theta_in_either_place() -> None:
    values = {k: v for k, v in MIXTRAL.to_hf().items() if k != "rope_theta"}
    assert ModelConfig.from_hf({**values, "rope_theta": 7.0}).rope_theta == 7.0
    nested = {"rope_type": "default", "rope_theta": 7.0}
    assert ModelConfig.from_hf({**values, "rope_parameters": nested}).rope_theta == 7.0
    assert ModelConfig.from_hf(values).rope_theta == 1e6


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' RoPE"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "'yarn' RoPE"),
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_shared_experts": 1}, r"\['num_shared_experts'\]"),
        ({"model_type": "llama"}, "'llama'"),
        ({"hidden_size": None}, "dim is None"),
    ],
)
def test_what_would_change_the_model_is_refused(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_hf({**MIXTRAL.to_hf(), **extra})


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size"])
def test_missing_shapes_are_named(key: str) -> None:
    values = MIXTRAL.to_hf()
    del values[key]
    with pytest.raises(ConfigError, match="missing"):
        ModelConfig.from_hf(values)
