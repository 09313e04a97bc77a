import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tramontane.engine.sampler import Sampler, penalize_repetition
from tramontane.engine.sampling_params import SamplingParams

VOCAB = 97


def make_logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def make_sampler(prompt_ids=(), **params) -> Sampler:
    return Sampler(SamplingParams(**params), prompt_ids=prompt_ids, vocab_size=VOCAB)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_matches_transformers(penalty):
    logits, ids = make_logits(0), [3, 5, 5, 90]
    seen = torch.zeros(VOCAB, dtype=torch.bool)
    seen[ids] = True
    oracle = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits[None].clone())
    torch.testing.assert_close(penalize_repetition(logits, seen, penalty), oracle[0])


@pytest.mark.parametrize("seed", range(5))
def test_all_filters_together_match_transformers(seed):
    logits = make_logits(seed)
    sampler = make_sampler(temperature=0.7, top_k=40, top_p=0.9, min_p=0.02)
    oracle = LogitsProcessorList(
        [
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )
    torch.testing.assert_close(
        torch.softmax(sampler.filter(logits), dim=0),
        torch.softmax(oracle(None, logits[None])[0], dim=0),
    )


def test_temperature_zero_takes_the_likeliest():
    assert make_sampler(temperature=0).sample(make_logits(1)) == make_logits(1).argmax()


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 100.0])
def test_extreme_temperatures_draw_a_token_that_was_kept(temperature):
    logits = make_logits(1)
    sampler = make_sampler(temperature=temperature, top_k=3, seed=0)
    assert all(sampler.sample(logits) in logits.topk(3).indices for _ in range(50))


def test_the_seed_alone_decides_the_draws():
    logits = make_logits(2)
    one, other = make_sampler(seed=7), make_sampler(seed=7)
    torch.rand(3)  # the global generator plays no part
    first = [int(one.sample(logits)) for _ in range(20)]
    torch.manual_seed(1)
    assert [int(other.sample(logits)) for _ in range(20)] == first
    assert [int(make_sampler(seed=8).sample(logits)) for _ in range(20)] != first


def test_penalty_covers_the_prompt_and_the_answer():
    logits = torch.full((VOCAB,), -5.0)
    logits[:3] = torch.tensor([4.0, 3.0, 2.0])
    sampler = make_sampler([0], temperature=0, repetition_penalty=10)
    assert [int(sampler.sample(logits)) for _ in range(3)] == [1, 2, 0]


def test_nan_scores_still_give_an_id():
    sampler = make_sampler(repetition_penalty=1.1)
    assert 0 <= sampler.sample(torch.full((VOCAB,), float("nan"))) < VOCAB
