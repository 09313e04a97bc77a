"""Each edit of the scores against transformers, or the formula where it has none; seeds; batches.

The filters of the draw (temperature, top-k, top-p, min-p) are the kernels': tests/kernels.
"""

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tramontane.engine.sampler import Sampler, sample_rows
from tramontane.engine.sampling_params import SamplingParams
from tramontane.errors import RequestError

VOCAB = 97
EOS = 2
PROMPT = [3, 5, 5, 90]
ANSWER = [7, 5, 7, 7, 96]


def make_logits(seed: int) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def make_sampler(*, prompt_ids=PROMPT, answer=(), index=0, matcher=None, **params) -> Sampler:
    sampler = Sampler(
        SamplingParams(**params), prompt_ids=prompt_ids, vocab_size=VOCAB, eos_ids=[EOS, VOCAB + 3],
        index=index, matcher=matcher,
    )  # fmt: skip
    for token_id in answer:
        sampler.accept(token_id)
    return sampler


def sample(sampler: Sampler, logits: Tensor) -> int:
    row = logits if sampler.is_plain else sampler.edit(logits)
    [token_id] = sample_rows(row[None], [sampler])
    sampler.accept(token_id)
    return token_id


def ask(oracle, logits: Tensor, ids=(*PROMPT, *ANSWER)) -> Tensor:
    return oracle(torch.tensor([list(ids)]), logits[None].clone())[0]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_is_transformers(penalty: float) -> None:
    for seed in range(3):
        logits = make_logits(seed)
        edited = make_sampler(answer=ANSWER, repetition_penalty=penalty).edit(logits)
        torch.testing.assert_close(edited, ask(RepetitionPenaltyLogitsProcessor(penalty), logits))


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 1.1), (-2.0, 2.0)])
def test_presence_and_frequency_penalties_are_openais_formula(
    presence: float, frequency: float
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c of the answer alone."""
    logits = make_logits(0)
    counts = np.bincount(ANSWER, minlength=VOCAB).astype(np.float64)
    expected = logits.double().numpy() - counts * frequency - (counts > 0) * presence
    params = {"presence_penalty": presence, "frequency_penalty": frequency}
    edited = make_sampler(answer=ANSWER, **params).edit(logits)
    np.testing.assert_allclose(edited.numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(make_sampler(**params).edit(logits), logits)  # no answer yet


def test_logit_bias_is_transformers() -> None:
    bias = {0: 5.0, 7: -100.0, 96: 0.25}
    oracle = SequenceBiasLogitsProcessor({(token_id,): value for token_id, value in bias.items()})
    edited = make_sampler(answer=ANSWER, logit_bias=bias).edit(make_logits(1))
    torch.testing.assert_close(edited, ask(oracle, make_logits(1)))


def test_allowed_ids_are_transformers() -> None:
    allowed = [4, 90, 96]
    oracle = PrefixConstrainedLogitsProcessor(lambda batch, ids: allowed, num_beams=1)
    edited = make_sampler(allowed_token_ids=allowed).edit(make_logits(2))
    torch.testing.assert_close(edited, ask(oracle, make_logits(2)))


@pytest.mark.parametrize("min_tokens", [0, 5, 6, 9])
def test_min_tokens_is_transformers(min_tokens: int) -> None:
    """No end, and no stop id, before so many tokens of the answer."""
    oracle = MinNewTokensLengthLogitsProcessor(len(PROMPT), max(1, min_tokens), [EOS, 11])
    sampler = make_sampler(answer=ANSWER, min_tokens=min_tokens, stop_token_ids=(11,))
    assert sampler.is_plain == (len(ANSWER) >= min_tokens)
    torch.testing.assert_close(sampler.edit(make_logits(3)), ask(oracle, make_logits(3)))


@pytest.mark.parametrize("seed", range(4))
def test_all_rules_together_are_transformers(seed: int) -> None:
    """In our order, and the draw goes through the chances that they leave."""
    bias = {7: 1.5, 30: -3.0}
    allowed = list(range(0, VOCAB, 2)) + ANSWER
    edits = LogitsProcessorList([
        PrefixConstrainedLogitsProcessor(lambda batch, ids: allowed, num_beams=1),
        SequenceBiasLogitsProcessor({(token_id,): value for token_id, value in bias.items()}),
        RepetitionPenaltyLogitsProcessor(1.2),
        MinNewTokensLengthLogitsProcessor(len(PROMPT), 9, [EOS]),
    ])  # fmt: skip
    draws = LogitsProcessorList([
        TemperatureLogitsWarper(0.7), TopKLogitsWarper(30), TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.02),
    ])  # fmt: skip
    params = {"logit_bias": bias, "allowed_token_ids": allowed, "repetition_penalty": 1.2,
              "min_tokens": 9, "temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02,
              "seed": seed}  # fmt: skip
    edited = make_sampler(answer=ANSWER, **params).edit(make_logits(seed))
    expected = ask(edits, make_logits(seed))
    torch.testing.assert_close(edited, expected)
    chances = torch.softmax(ask(draws, expected), dim=0).double()
    sums, dice = (chances / chances.sum()).cumsum(0), random.Random(seed)
    sampler = make_sampler(answer=ANSWER, **params)
    rows = edited.expand(500, -1)
    drawn = sample_rows(rows, [sampler] * 500)
    expected_ids = [int(torch.searchsorted(sums, dice.random(), right=True)) for _ in range(500)]
    # A number within rounding of a border between two tokens may fall on either side.
    assert sum(a != b for a, b in zip(drawn, expected_ids, strict=True)) <= 2


def test_the_bias_comes_before_the_penalties() -> None:
    logits = torch.full((VOCAB,), -1.0)
    edited = make_sampler(logit_bias={5: 3.0}, repetition_penalty=2.0).edit(logits)
    assert edited[5] == 1.0  # (-1 + 3) / 2, not -1 * 2 + 3


def test_an_edit_leaves_the_models_scores_as_they_are() -> None:
    logits = make_logits(0)
    make_sampler(
        answer=ANSWER, logit_bias={1: 1.0}, repetition_penalty=2, presence_penalty=1, min_tokens=9
    ).edit(logits)
    assert torch.equal(logits, make_logits(0))


def test_what_is_plain_needs_no_edit() -> None:
    assert make_sampler(temperature=0.7, top_k=3, seed=1).is_plain
    for params in ({"repetition_penalty": 1.1}, {"presence_penalty": -1}, {"logit_bias": {1: 1}},
                   {"frequency_penalty": 1}, {"allowed_token_ids": (1,)},
                   {"min_tokens": 1}):  # fmt: skip
        assert not make_sampler(**params).is_plain
    assert not make_sampler(matcher=OneToken(3)).is_plain


class OneToken:
    """A constraint that allows one token, once."""

    def __init__(self, token_id: int) -> None:
        self.token_id, self.is_exhausted = token_id, False

    def allowed_mask(self) -> Tensor:
        return torch.arange(VOCAB) == self.token_id

    def accept(self, token_id: int) -> None:
        assert token_id == self.token_id
        self.is_exhausted = True


def test_the_constraint_comes_first_and_ends_the_answer() -> None:
    sampler = make_sampler(matcher=OneToken(EOS + 1), logit_bias={7: 100.0}, seed=0)
    assert not sampler.is_exhausted
    assert sample(sampler, make_logits(0)) == EOS + 1
    assert sampler.is_exhausted
    assert not make_sampler().is_exhausted


@pytest.mark.parametrize("params", [{"min_tokens": 2}, {"allowed_token_ids": (5,)}])
def test_where_no_token_is_left_it_says_so(params: dict) -> None:
    with pytest.raises(RequestError, match="no token is left to choose"):
        make_sampler(matcher=OneToken(EOS), **params).edit(make_logits(0))


@pytest.mark.parametrize(
    "params",
    [{"logit_bias": {VOCAB: 1.0}}, {"allowed_token_ids": (1, 2**31 - 1)},
     {"stop_token_ids": (VOCAB,)}],
)  # fmt: skip
def test_a10_ids_beyond_the_vocabulary_are_named(params: dict) -> None:
    [name] = params
    with pytest.raises(RequestError, match=rf"{name} holds the id \d+; .* are 0 to 96"):
        make_sampler(**params)


def test_a10_a_prompt_may_hold_ids_beyond_the_vocabulary() -> None:
    """Rows that fill up a head have ids too: the penalty does not fail for them."""
    sampler = make_sampler(prompt_ids=[5, VOCAB + 2], repetition_penalty=2.0)
    assert (sampler.edit(make_logits(0)) != make_logits(0)).nonzero().tolist() == [[5]]


def test_penalty_covers_the_prompt_and_the_answer() -> None:
    logits = torch.full((VOCAB,), -5.0)
    logits[:3] = torch.tensor([4.0, 3.0, 2.0])
    sampler = make_sampler(prompt_ids=[0], temperature=0, repetition_penalty=10)
    assert [sample(sampler, logits) for _ in range(3)] == [1, 2, 0]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sample(make_sampler(temperature=0), make_logits(1)) == make_logits(1).argmax()


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 100.0])
def test_extreme_temperatures_draw_a_token_that_was_kept(temperature: float) -> None:
    logits = make_logits(1)
    sampler = make_sampler(temperature=temperature, top_k=3, seed=0)
    kept = logits.topk(3).indices.tolist()
    assert all(sample(sampler, logits) in kept for _ in range(50))


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.25, 0.0, 0.25]).log()
    sampler = Sampler(SamplingParams(temperature=1, top_p=1, seed=0), prompt_ids=[], vocab_size=4)
    counts = torch.bincount(torch.tensor(sample_rows(logits.expand(4000, 4), [sampler] * 4000)),
                            minlength=4)  # fmt: skip
    torch.testing.assert_close(counts / 4000, logits.exp(), atol=0.03, rtol=0)
    assert counts[2] == 0


def test_e30_the_seed_alone_decides_the_draws() -> None:
    logits = make_logits(2)
    one, other = make_sampler(seed=7), make_sampler(seed=7)
    first = [sample(one, logits) for _ in range(20)]
    torch.manual_seed(1)  # the global generators play no part
    random.seed(1)
    assert [sample(other, logits) for _ in range(20)] == first
    assert [sample(make_sampler(seed=8), logits) for _ in range(20)] != first
    unseeded = {tuple(sample(sampler, logits) for _ in range(20))
                for sampler in (make_sampler(), make_sampler())}  # fmt: skip
    assert len(unseeded) == 2


def test_e30_answer_number_i_draws_from_seed_plus_i() -> None:
    logits, largest = make_logits(2), 2**63 - 1
    for i in range(4):
        numbered, other = make_sampler(seed=7, index=i), make_sampler(seed=7 + i)
        assert [sample(numbered, logits) for _ in range(9)] == [
            sample(other, logits) for _ in range(9)
        ]
    assert 0 <= make_sampler(seed=largest, index=127).draw_number() < 1


ROWS = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.2, "top_k": 5, "seed": 2},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 0.5, "top_p": 0.3, "min_p": 0.1, "seed": 3},
    {"temperature": 1.0, "min_tokens": 50, "seed": 4, "logit_bias": {9: 4.0}},
    {"temperature": 2.0, "presence_penalty": 1.0, "seed": 5, "allowed_token_ids": (1, 5, 9)},
]


def test_e30_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """Same tokens alone, in a batch, and in another order, over 20 steps."""
    steps = [torch.stack([make_logits(100 * step + r) for r in range(len(ROWS))])
             for step in range(20)]  # fmt: skip

    def run(order: list[int]) -> dict[int, list[int]]:
        samplers = {r: make_sampler(**ROWS[r]) for r in order}
        chosen: dict[int, list[int]] = {r: [] for r in order}
        for logits in steps:
            rows = [logits[r] if samplers[r].is_plain else samplers[r].edit(logits[r])
                    for r in order]  # fmt: skip
            ids = sample_rows(torch.stack(rows), [samplers[r] for r in order])
            for r, token_id in zip(order, ids, strict=True):
                samplers[r].accept(token_id)
                chosen[r].append(token_id)
        return chosen

    everyone = list(range(len(ROWS)))
    together = run(everyone)
    assert run(everyone[::-1]) == together
    assert {r: run([r])[r] for r in everyone} == together


def test_greedy_rows_take_the_best_alone_and_beside_others() -> None:
    logits = torch.stack([make_logits(0), make_logits(1)])
    samplers = [make_sampler(temperature=0), make_sampler(temperature=0)]
    assert sample_rows(logits, samplers) == logits.argmax(dim=1).tolist()
    samplers[1] = make_sampler(temperature=1.0)
    assert sample_rows(logits, samplers)[0] == logits[0].argmax()


def test_numbers_that_were_foreseen_are_drawn_in_their_order() -> None:
    plain, foreseen = make_sampler(seed=4), make_sampler(seed=4)
    expected = [plain.draw_number() for _ in range(6)]
    assert foreseen.foresee_numbers(2) == expected[:2]
    assert foreseen.draw_number() == expected[0]
    assert foreseen.foresee_numbers(3) == expected[1:4]
    assert [foreseen.draw_number() for _ in range(5)] == expected[1:]
    assert make_sampler(temperature=0).foresee_numbers(2) == [0.0, 0.0]


def test_nan_scores_still_give_an_id() -> None:
    sampler = make_sampler(repetition_penalty=1.1)
    assert 0 <= sample(sampler, torch.full((VOCAB,), float("nan"))) < VOCAB
