"""Counted operations against torch's own counter, and the peak they are compared with."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.oracles.hf import to_hf_model
from tests.tiny import make_config, make_model
from tramontane.config import MoeConfig, get_preset
from tramontane.train.flops import count_flops_per_token, measure_peak_flops


@pytest.mark.parametrize("moe", [MoeConfig(), None])
@pytest.mark.parametrize("tie", [True, False])
def test_operations_are_those_that_torch_counts(moe: MoeConfig | None, tie: bool) -> None:
    """Of transformers' forward pass; it computes all pairs of tokens, of which we count half."""
    config = make_config(moe=moe, tie_embeddings=tie)
    hf_model = to_hf_model(make_model(config))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf_model(input_ids=torch.from_numpy(np.arange(64)[None]), use_cache=False)
    pairs = 2 * 2 * config.n_layers * config.n_heads * config.head_dim * 64
    ours = count_flops_per_token(config, seq_len=64) / 3 + pairs / 2
    assert counter.get_total_flops() / 64 == pytest.approx(ours, rel=0.01)


def test_a_window_bounds_attention() -> None:
    config = get_preset("mistral-7b")
    assert count_flops_per_token(config, seq_len=32768) == count_flops_per_token(
        config, seq_len=8192
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_a_rate(dtype: torch.dtype) -> None:
    assert 1e8 < measure_peak_flops(dtype, torch.device("cpu")) < 1e15
