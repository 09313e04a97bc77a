import pytest
import torch

from tests.oracles.hf import compute_hf_logits, to_hf_model
from tests.tiny import make_config, make_model, make_tokens
from tramontane.engine.kv_cache import KVCache, batch_layer_caches
from tramontane.models.transformer import Transformer

WINDOW = 8


def run_chunks(model: Transformer, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of all tokens, run through one cache in chunks of these sizes."""
    cache = KVCache(model.config, max_tokens=len(tokens))
    logits, start = [], 0
    for chunk in tokens.split(sizes):
        positions = torch.arange(start, start + len(chunk))
        logits.append(model.compute_logits(model(chunk, positions, cache.layers).hidden))
        start += len(chunk)
    assert cache.num_tokens == len(tokens)
    return torch.cat(logits)


def split_evenly(count: int, size: int) -> list[int]:
    return [size] * (count // size) + [count % size] * (count % size > 0)


@pytest.fixture(params=["mixtral", "mistral"])
def family(request):
    return {} if request.param == "mixtral" else {"moe": None}


@torch.inference_mode()
def test_prefill_and_decode_match_transformers(family):
    model = make_model(make_config(**family))
    tokens = make_tokens(40)
    expected = compute_hf_logits(to_hf_model(model), tokens)
    torch.testing.assert_close(
        run_chunks(model, tokens, [20] + [1] * 20), expected, atol=1e-5, rtol=0
    )


@torch.inference_mode()
def test_every_chunk_size_gives_the_same_logits():
    model = make_model()
    tokens = make_tokens(17)
    whole = run_chunks(model, tokens, [17])
    for size in range(1, 17):
        logits = run_chunks(model, tokens, split_evenly(17, size))
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 40])
def test_rolling_cache_matches_transformers_over_five_windows(family, size):
    model = make_model(make_config(sliding_window=WINDOW, **family))
    tokens = make_tokens(5 * WINDOW)
    expected = compute_hf_logits(to_hf_model(model), tokens)
    logits = run_chunks(model, tokens, split_evenly(len(tokens), size))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 20])
def test_rolling_cache_decodes_after_a_prompt_of_any_length(prompt):
    model = make_model(make_config(sliding_window=WINDOW))
    tokens = make_tokens(5 * WINDOW)
    expected = compute_hf_logits(to_hf_model(model), tokens)
    logits = run_chunks(model, tokens, [prompt] + [1] * (len(tokens) - prompt))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_ragged_batch_equals_sequences_alone():
    model = make_model(make_config(sliding_window=WINDOW))
    prompts = [make_tokens(length, seed=length) for length in (1, 5, 9, 20)]
    alone = [run_chunks(model, tokens, [len(tokens)]) for tokens in prompts]
    caches = [KVCache(model.config, max_tokens=32) for _ in prompts]
    seqlens = [len(tokens) for tokens in prompts]
    positions = torch.cat([torch.arange(length) for length in seqlens])
    output = model(torch.cat(prompts), positions, batch_layer_caches(caches, seqlens))
    torch.testing.assert_close(
        model.compute_logits(output.hidden), torch.cat(alone), atol=1e-5, rtol=0
    )
    assert [cache.num_tokens for cache in caches] == seqlens


def test_rolling_cache_stays_within_the_window():
    config = make_config(sliding_window=WINDOW)
    window_bytes = config.count_kv_bytes_per_token(bytes_per_value=4) * WINDOW
    model = make_model(config)
    cache = KVCache(config, max_tokens=200)
    with torch.inference_mode():
        for position, token in enumerate(make_tokens(5 * WINDOW)):
            model(token[None], torch.tensor([position]), cache.layers)
            assert count_stored_bytes(cache) == window_bytes == cache.num_bytes


def test_contiguous_cache_holds_every_token():
    config = make_config()
    cache = KVCache(config, max_tokens=10, dtype=torch.bfloat16)
    assert cache.num_bytes == config.count_kv_bytes_per_token() * 10 == count_stored_bytes(cache)


def test_decode_hands_views_of_the_cache_to_the_kernel(monkeypatch):
    """No copy of what is cached: the kernel reads the buffers themselves."""
    config = make_config(sliding_window=WINDOW)
    model, cache = make_model(config), KVCache(config, max_tokens=200)
    storage = cache.layers[0]._keys.untyped_storage().data_ptr()
    seen = []

    class Recorder:
        @staticmethod
        def causal_attention(q, k, v, *, window):
            seen.append(k.untyped_storage().data_ptr() == storage)
            return q

    with torch.inference_mode():
        monkeypatch.setattr("tramontane.engine.kv_cache.get_kernels", lambda: Recorder)
        for position, token in enumerate(make_tokens(2 * WINDOW)):
            model(token[None], torch.tensor([position]), cache.layers)
    assert all(seen)
    assert len(seen) == 2 * WINDOW * config.n_layers


def count_stored_bytes(cache: KVCache) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer._keys, layer._values)
    }
    return sum(storages.values())
