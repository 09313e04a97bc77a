"""`params.json`: what it may leave open is said, what would change the answers is asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.layouts import save_hf, save_mistral
from tests.tiny import make_config, make_model
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.mistral import list_assumed, parse_params, write_params
from tramontane.checkpoint.summary import summarize
from tramontane.config import get_preset
from tramontane.errors import ConfigError

GOOD = write_params(make_config())
# As in the torrent of December 2023; the second has the sizes of Mixtral 8x22B.
TORRENT = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32,
    "n_kv_heads": 8, "norm_eps": 1e-05, "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}  # fmt: skip
LARGE = TORRENT | {"dim": 6144, "n_layers": 56, "hidden_dim": 16384, "n_heads": 48,
                   "vocab_size": 32768}  # fmt: skip


def test_the_torrent_of_mixtral_is_what_the_preset_says() -> None:
    assert parse_params(TORRENT) == get_preset("mixtral-8x7b")
    assert list_assumed(TORRENT) == (
        "rope_theta 1,000,000, as mistral-inference does",
        "a context of 32,768 tokens (max_seq_len)",
    )


def test_the_context_of_a_published_shape_is_its_own() -> None:
    """8x22B has 65,536 in its config.json, and nothing in its params.json."""
    assert parse_params(LARGE) == get_preset("mixtral-8x22b", vocab_size=32768)
    assert "a context of 65,536 tokens (max_seq_len)" in list_assumed(LARGE)
    assert parse_params(LARGE | {"max_seq_len": 8192}).max_seq_len == 8192
    assert parse_params(LARGE | {"max_position_embeddings": 1024}).max_seq_len == 1024
    assert list_assumed(LARGE | {"max_seq_len": 8192, "rope_theta": 1e6}) == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_eps": None}, "it lacks norm_eps, and a guess would change the answers"),
        ({"moe": {}}, "moe lacks num_experts and num_experts_per_tok"),
        ({"moe": {"num_experts": 8}}, "moe lacks num_experts_per_tok"),
        ({"vision_encoder": {"hidden_size": 1}}, "vision_encoder is .*; only None is built"),
        ({"quantization": {"qformat_weight": "fp8"}}, "quantization is"),
        ({"causal": False}, "causal is False; only True is built"),
        ({"ffn_dim_multiplier": 1.3}, "unknown keys .*ffn_dim_multiplier"),
    ],
)  # fmt: skip
def test_what_cannot_be_guessed_or_is_not_built_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = save_mistral(make_model(), tmp_path / "m")
    (folder / "params.json").write_text(json.dumps(GOOD | changes))
    with pytest.raises(ConfigError, match=said) as error:
        load_model(folder)
    assert f"{folder / 'params.json'}: " in str(error.value)


def test_keys_without_effect_are_accepted() -> None:
    harmless = {"max_batch_size": 8, "lora": None, "causal": True, "use_biases": False,
                "model_type": "transformer", "vision_encoder": None}  # fmt: skip
    assert parse_params(GOOD | harmless) == make_config()


def test_what_is_assumed_is_shown_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mistral = save_mistral(make_model(), tmp_path / "m")
    values = {k: v for k, v in GOOD.items() if k not in ("max_seq_len", "rope_theta")}
    (mistral / "params.json").write_text(json.dumps(values))
    hf = save_hf(make_model(), tmp_path / "h")
    config = json.loads((hf / "config.json").read_text())
    del config["max_position_embeddings"]
    (hf / "config.json").write_text(json.dumps(config))
    for folder, file, count in ((mistral, "params.json", 2), (hf, "config.json", 1)):
        assumed = summarize(str(folder)).assumed
        assert len(assumed) == count
        assert caplog.messages == []
        load_model(folder)
        assert caplog.messages == [
            f"{folder / file} does not say it, and so it is assumed: {what}" for what in assumed
        ]
        caplog.clear()
