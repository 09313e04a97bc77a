"""Nothing in a GGUF that changes the computation is passed over (C40 for what does not)."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.checkpoint.layouts import list_tensors
from tests.tiny import make_config, make_model
from tramontane.checkpoint.gguf import describe_for_gguf, parse_gguf_config
from tramontane.checkpoint.intake import open_checkpoint
from tramontane.checkpoint.loader import load_model
from tramontane.checkpoint.names import GGUF
from tramontane.checkpoint.summary import summarize
from tramontane.errors import CheckpointError, ConfigError

GOOD = describe_for_gguf(make_config()) | {"general.architecture": "llama"}

OTHER_COMPUTATIONS: dict[str, Any] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scale_linear": 0.5,
    "rope.scaling.attn_factor": 1.5,
    "rope.freq_base_swa": 1e6,
    "rope.dimension_count": 8,
    "rope.dimension_sections": np.array([4, 4, 0], dtype="<u4"),
    "attention.scale": 0.5,
    "attention.value_length": 8,
    "attention.causal": False,
    "attention.clamp_kqv": 8.0,
    "attention.max_alibi_bias": 8.0,
    "attention.head_count_kv": np.array([2, 1], dtype="<u4"),
    "attention.sliding_window_pattern": np.array([True, False]),
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logit_scale": 0.0625,
    "embedding_scale": 12.0,
    "residual_scale": 0.22,
    "expert_weights_scale": 2.5,
    "expert_weights_norm": False,
    "expert_gating_func": 2,
    "expert_shared_count": 1,
    "expert_group_count": 8,
    "expert_feed_forward_length": 48,
    "leading_dense_block_count": 1,
    "nextn_predict_layers": 1,
    "use_parallel_residual": True,
    "nobody.knows.this": 7,
}
WITHOUT_CHANGE: dict[str, Any] = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "rope.freq_base_swa": 1e4,
    "rope.dimension_count": 16,
    "rope.scaling.original_context_length": 4096,
    "rope.scaling.finetuned": False,
    "attention.scale": float(np.float32(16**-0.5)),
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.head_count_kv": np.array([2, 2], dtype="<u4"),
    "attention.sliding_window": 0,
    "logit_scale": 1.0,
    "expert_weights_scale": 0.0,
    "expert_weights_norm": True,
    "expert_gating_func": 1,
    "expert_shared_count": 0,
    "expert_feed_forward_length": 96,
    "tensor_data_layout": "Meta AI original pth",
}


@pytest.mark.parametrize(("name", "value"), OTHER_COMPUTATIONS.items())
def test_a_key_that_changes_the_computation_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"llama\.{name}"):
        parse_gguf_config(GOOD | {f"llama.{name}": value}, has_output=True)


@pytest.mark.parametrize(("name", "value"), WITHOUT_CHANGE.items())
def test_a_value_that_changes_nothing_is_accepted(name: str, value: Any) -> None:
    config = parse_gguf_config(GOOD | {f"llama.{name}": value}, has_output=True)
    assert config == make_config()


def test_c40_keys_of_others_are_ignored() -> None:
    others = {"nobody.knows.this": 7, "general.logit_scale": 2.0, "mamba.rope.scale_linear": 4.0}
    assert parse_gguf_config(GOOD | others, has_output=True) == make_config()


@pytest.mark.parametrize("name", ["expert_used_count", "attention.layer_norm_rms_epsilon"])
def test_what_cannot_be_guessed_without_harm_is_asked_for(name: str) -> None:
    keys = {key: value for key, value in GOOD.items() if key != f"llama.{name}"}
    with pytest.raises(ConfigError, match=rf"llama\.{name} is missing, and a guess would change"):
        parse_gguf_config(keys, has_output=True)


def save_gguf(path: Path, *, keys: dict[str, Any] | None = None, **extra: torch.Tensor) -> Path:
    """A tiny model with more tensors, and other keys than its own."""
    model = make_model()
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (describe_for_gguf(model.config) if keys is None else keys).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(key, value)
    for name, tensor in (list_tensors(model, GGUF) | extra).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_factors_of_rope_have_to_be_one(tmp_path: Path) -> None:
    """rope_freqs.weight: Llama 3.1 has factors up to 8 there, which would change every answer."""
    path = save_gguf(tmp_path / "f", **{"rope_freqs.weight": torch.ones(8)})
    expected = make_model().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in load_model(path).state_dict().items())
    assert summarize(str(path)).problems == ()
    factors = torch.tensor([1.0] * 6 + [4.0, 8.0])
    for wrong, fault in (
        (factors, r"rope_freqs\.weight scales RoPE's frequencies by 1 to 8; only unscaled"),
        (torch.full((8,), float("nan")), r"rope_freqs\.weight scales RoPE's frequencies by nan"),
        (torch.ones(4), r"rope_freqs\.weight has F32 of shape \[4\]; \[8\] of F32 or F16 or BF16"),
    ):
        path = save_gguf(tmp_path / "f", **{"rope_freqs.weight": wrong})
        with pytest.raises(CheckpointError, match=fault):
            load_model(path)
        assert "rope_freqs.weight" in summarize(str(path)).problems[0]


def test_a_context_that_is_not_said_is_said_to_be_assumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = describe_for_gguf(make_config())
    del keys["llama.context_length"]
    path = save_gguf(tmp_path / "f", keys=keys)
    assumed = ("a context of 32,768 tokens (llama.context_length)",)
    assert open_checkpoint(path).assumed == assumed
    assert summarize(str(path)).assumed == assumed
    load_model(path)
    (said,) = caplog.messages
    assert str(path) in said
    assert assumed[0] in said


def test_a_vocabulary_of_no_words(tmp_path: Path) -> None:
    keys = {key: value for key, value in GOOD.items() if key != "llama.vocab_size"}
    with pytest.raises(ConfigError, match="vocab_size"):
        parse_gguf_config(keys | {"tokenizer.ggml.tokens": 7}, has_output=True)
