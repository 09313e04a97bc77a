"""Peak memory of loading: the model and at most 256 MiB, in every layout and for packed files."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint import load_memory
from tests.checkpoint.layouts import LAYOUTS, save_gguf, save_hf_published
from tests.checkpoint.peak_memory import run_program
from tramontane.config import ModelConfig, MoeConfig
from tramontane.models.transformer import Transformer, build_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
LIMIT = 256 * 1024  # KiB; a layer's experts alone take 302 MB, a matrix of all experts 101 MB


@pytest.fixture(scope="module")
def model() -> Transformer:
    """470 MB in fp32, nearly all of it in the experts of two layers."""
    config = ModelConfig(
        dim=1024, n_layers=2, head_dim=64, hidden_dim=2304, n_heads=16, n_kv_heads=4,
        vocab_size=512, moe=MoeConfig(),
    )  # fmt: skip
    return build_model(config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("save", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_peak_is_the_model_and_little_more(
    tmp_path: Path, model: Transformer, save: Any, dtype: str
) -> None:
    path = save(model, tmp_path / "m")
    found = run_program(load_memory.__file__, str(path), dtype)
    assert found["model"] > 200 * 1024
    assert found["beyond"] < LIMIT, found


@pytest.fixture(scope="module")
def wide_model() -> Transformer:
    """A vocabulary of 100,000: embeddings and head have 154 MB each in fp32, all else is small."""
    config = ModelConfig(
        dim=384, n_layers=1, head_dim=64, hidden_dim=64, n_heads=6, n_kv_heads=2,
        vocab_size=100_000, moe=MoeConfig(num_experts=2),
    )  # fmt: skip
    return build_model(config)


WIDE = {
    "Hugging Face": LAYOUTS["Hugging Face"], "torrent": LAYOUTS["torrent"],
    "GGUF, Q8_0": partial(save_gguf, encoding="Q8_0"),
}  # fmt: skip


@pytest.mark.parametrize("save", WIDE.values(), ids=WIDE.keys())
def test_converting_a_large_vocabulary_takes_a_chunk_at_a_time(
    tmp_path: Path, wide_model: Transformer, save: Any
) -> None:
    """To map a tensor whole while it is converted would take all of it beside the model."""
    path = save(wide_model, tmp_path / "m")
    found = run_program(load_memory.__file__, str(path), "bfloat16")
    assert found["model"] > 140 * 1024
    assert found["beyond"] < 100 * 1024, found


def test_published_weights_take_no_memory_of_their_own(tmp_path: Path) -> None:
    """Experts that lie one after another in a file stay there: stacks are views of it."""
    config = ModelConfig(
        dim=256, n_layers=2, head_dim=64, hidden_dim=1024, n_heads=4, n_kv_heads=2,
        vocab_size=512, moe=MoeConfig(),
    )  # fmt: skip
    path = save_hf_published(build_model(config), tmp_path / "m")
    found = run_program(load_memory.__file__, str(path), "float32")
    assert found["model"] > 48 * 1024
    assert found["own"] < 6 * 1024, found
    assert found["beyond"] < 12 * 1024, found


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["Q8_0", "Q4_0"])
def test_peak_of_packed_files(tmp_path: Path, model: Transformer, encoding: str) -> None:
    path = save_gguf(model, tmp_path / "m", encoding=encoding)
    found = run_program(load_memory.__file__, str(path), "bfloat16")
    assert found["beyond"] < LIMIT, found
