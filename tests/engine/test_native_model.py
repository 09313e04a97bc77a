"""The model in one native call gives the bits of its own forward pass, whatever the batch."""

from collections.abc import Callable

import pytest
import torch

from tests.tiny import make_config, make_model, make_tokens
from tramontane.config import ModelConfig
from tramontane.engine.kv_cache import KVCache, batch_layer_caches
from tramontane.engine.native_model import NativeModel, build_native_model
from tramontane.models.transformer import ForwardOutput, Transformer
from tramontane.quant.apply import quantize_model
from tramontane.quant.formats import QuantFormat, QuantRecipe

# Tokens that each of three sequences runs in one pass after another; 0 is not in it.
PASSES = [(5, 1, 17), (1, 1, 1), (0, 30, 1), (1, 3, 0), (20, 1, 1)]


@pytest.fixture(autouse=True)
def _native(choose_kernels: Callable[[str], None]) -> None:
    choose_kernels("native")


def run_both(model: Transformer) -> list[tuple[ForwardOutput, ForwardOutput]]:
    """All passes, natively and by the model itself, each with caches of its own."""
    native = build_native_model(model)
    assert native is not None
    dtype = model.norm.weight.dtype
    caches = [[KVCache(model.config, max_tokens=100, dtype=dtype) for _ in range(3)] for _ in "ab"]
    outputs = []
    for number, lengths in enumerate(PASSES):
        active = [i for i, length in enumerate(lengths) if length]
        seqlens = [lengths[i] for i in active]
        ours, theirs = ([some[i] for i in active] for some in caches)
        positions = torch.cat([
            torch.arange(cache.num_tokens, cache.num_tokens + length)
            for cache, length in zip(ours, seqlens, strict=True)
        ])  # fmt: skip
        tokens = make_tokens(sum(seqlens), seed=number)
        output = native.run(tokens, seqlens, ours)
        assert output is not None
        expected = model(tokens, positions, batch_layer_caches(theirs, seqlens))
        outputs.append((output, expected))
    assert [c.num_tokens for c in caches[0]] == [c.num_tokens for c in caches[1]] == [27, 36, 20]
    return outputs


def assert_same_bits(model: Transformer) -> None:
    with torch.inference_mode():
        for output, expected in run_both(model):
            assert torch.equal(output.hidden, expected.hidden)
            for ours, theirs in zip(output.routing, expected.routing, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 70}, {"n_kv_heads": 1}], ids=str)
def test_plain(dtype: torch.dtype, changes: dict[str, int]) -> None:
    assert_same_bits(make_model(make_config(**changes)).to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(bits: int) -> None:
    config = make_config(dim=64, hidden_dim=96, head_dim=16)
    model = make_model(config).bfloat16()
    quantize_model(model, QuantRecipe.from_format(QuantFormat(bits)))
    assert_same_bits(model)


def test_a_rolling_cache_that_goes_around_is_not_for_it() -> None:
    model = make_model(make_config(sliding_window=16))
    native, cache = build_native_model(model), KVCache(model.config, max_tokens=100)
    assert native is not None
    with torch.inference_mode():
        assert native.run(make_tokens(10), [10], [cache]) is not None
        assert native.run(make_tokens(10), [10], [cache]) is None
    assert cache.num_tokens == 10


def test_a_model_that_was_cast_is_not_for_it_any_more() -> None:
    model = make_model(make_config())
    native = build_native_model(model)
    assert native is not None
    model.double()
    cache = KVCache(model.config, max_tokens=10)
    assert native.run(make_tokens(3), [3], [cache]) is None


@pytest.mark.parametrize("changes", [{"moe": None}, {"double": True}], ids=str)
def test_what_the_extension_does_not_have(changes: dict[str, bool | None]) -> None:
    is_double = changes.pop("double", False)
    config: ModelConfig = make_config(**changes)
    model = make_model(config)
    assert build_native_model(model.double() if is_double else model) is None


def test_only_native_kernels_run_it(choose_kernels: Callable[[str], None]) -> None:
    choose_kernels("fused")
    assert build_native_model(make_model(make_config())) is None
    choose_kernels("native")
    assert isinstance(build_native_model(make_model(make_config())), NativeModel)
