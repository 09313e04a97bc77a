import pytest
import torch

from tests.engine.paged import PagedSequences
from tests.oracles.hf import compute_hf_logits, to_hf_model
from tests.tiny import make_config, make_model, make_tokens
from tramontane.engine.kv_cache import KVPool, PagedBatch, count_block_bytes
from tramontane.models.transformer import Transformer

WINDOW = 8


def run_chunks(model: Transformer, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Logits of all tokens, run through one cache in chunks of these sizes."""
    cache = PagedSequences(model)
    return torch.cat([
        model.compute_logits(cache.run(chunk, [len(chunk)]).hidden)
        for chunk in tokens.split(sizes)
    ])  # fmt: skip


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
    logits = run_chunks(model, tokens, [20] + [1] * 20)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


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
def test_a_window_matches_transformers_over_five_windows(family, size):
    model = make_model(make_config(sliding_window=WINDOW, **family))
    tokens = make_tokens(5 * WINDOW)
    expected = compute_hf_logits(to_hf_model(model), tokens)
    logits = run_chunks(model, tokens, split_evenly(len(tokens), size))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 20])
def test_a_window_decodes_after_a_prompt_of_any_length(prompt):
    model = make_model(make_config(sliding_window=WINDOW))
    tokens = make_tokens(5 * WINDOW)
    expected = compute_hf_logits(to_hf_model(model), tokens)
    logits = run_chunks(model, tokens, [prompt] + [1] * (len(tokens) - prompt))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kernels", ["native", "fused", "reference"])
def test_ragged_batch_equals_sequences_alone(kernels, choose_kernels):
    choose_kernels(kernels)
    model = make_model(make_config(sliding_window=WINDOW))
    prompts = [make_tokens(length, seed=length) for length in (1, 5, 9, 20)]
    alone = [run_chunks(model, tokens, [len(tokens)]) for tokens in prompts]
    cache = PagedSequences(model, count=4)
    output = cache.run(torch.cat(prompts), [len(tokens) for tokens in prompts])
    torch.testing.assert_close(
        model.compute_logits(output.hidden), torch.cat(alone), atol=1e-5, rtol=0
    )


def test_a_pool_has_the_bytes_that_it_says():
    config = make_config()
    pool = KVPool(config, 5, dtype=torch.bfloat16)
    assert pool.num_bytes == config.count_kv_bytes_per_token() * 5 * 16
    assert (
        pool.num_bytes == pool.buffer.numel() * 2 == 5 * count_block_bytes(config, torch.bfloat16)
    )


def test_blocks_are_copied_in_all_layers_one_after_another():
    pool = KVPool(make_config(), 4)
    pool.buffer.normal_()
    first, second = pool.buffer[:, :, 0].clone(), pool.buffer[:, :, 1].clone()
    pool.copy_blocks([(0, 2), (1, 0), (2, 3)])
    assert torch.equal(pool.buffer[:, :, 3], first)
    assert torch.equal(pool.buffer[:, :, 0], second)


def test_slots_of_a_batch():
    """Two sequences: three tokens that end at 17, and one at 5."""
    batch = PagedBatch(
        torch.tensor([[7, 3], [2, 9]]), torch.tensor([3, 1]), torch.tensor([18, 6]), 18
    )
    assert batch.find_slots(16).tolist() == [7 * 16 + 15, 3 * 16, 3 * 16 + 1, 2 * 16 + 5]
