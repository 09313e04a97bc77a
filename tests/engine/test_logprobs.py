"""Log-probabilities against numpy in float64 and transformers; ranks of ties; memory."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitNormalization

from tramontane.engine import logprobs
from tramontane.engine.logprobs import compute_logprobs

VOCAB = 97


def make_logits(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def test_they_are_the_logarithms_of_the_chances() -> None:
    logits, ids = make_logits(5), [0, 96, 3, 50, 7]
    exact = logits.double().numpy()
    exact = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    normalized = LogitNormalization()(None, logits)
    for row, found in enumerate(compute_logprobs(logits, ids, 3)):
        assert found.token_id == ids[row]
        assert found.logprob == pytest.approx(exact[row, ids[row]], abs=5e-6)
        assert found.logprob == pytest.approx(normalized[row, ids[row]].item(), abs=1e-6)
        best = np.argsort(-exact[row], kind="stable")[:3]
        assert [token_id for token_id, _ in found.top] == best.tolist()
        assert [value for _, value in found.top] == pytest.approx(exact[row, best], abs=5e-6)


def test_none_and_more_than_there_are() -> None:
    [alone] = compute_logprobs(make_logits(1), [5], 0)
    assert alone.top == ()
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    [all_three] = compute_logprobs(logits, [0], 20)
    assert [token_id for token_id, _ in all_three.top] == [1, 2, 0]
    assert all_three.top[-1] == (0, all_three.logprob)
    assert compute_logprobs(make_logits(0), [], 5) == []


@pytest.mark.parametrize("num_top", [1, 2, 5, 20])
def test_of_equal_scores_the_lower_id_comes_first(num_top: int) -> None:
    """As scores rounded to bf16 often are; a stable sort is the oracle."""
    logits = torch.cat([make_logits(20).bfloat16().float(), make_logits(5).round(),
                        torch.zeros(1, VOCAB)])  # fmt: skip
    found = compute_logprobs(logits, [0] * len(logits), num_top)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    assert [[i for i, _ in one.top] for one in found] == order[:, :num_top].tolist()


def test_e30_a_row_has_the_same_bits_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits(40)
    together = compute_logprobs(logits, [3] * 40, 5)
    assert [compute_logprobs(logits[r : r + 1], [3], 5)[0] for r in range(40)] == together
    monkeypatch.setattr(logprobs, "_MAX_NUMBERS", 7 * VOCAB)
    assert compute_logprobs(logits, [3] * 40, 5) == together
    assert compute_logprobs(logits[:, :VOCAB].clone()[3:9], [3] * 6, 5) == together[3:9]


def test_a_long_prompt_needs_no_second_copy_of_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,000 rows no tensor is made that is larger than the bound."""
    monkeypatch.setattr(logprobs, "_MAX_NUMBERS", 8 * VOCAB)
    logits = make_logits(1000)
    with LargestTensor() as seen:
        compute_logprobs(logits, [1] * 1000, 20)
    assert VOCAB <= seen.size <= 8 * VOCAB


class LargestTensor(TorchDispatchMode):
    """Notes the numbers in the largest tensor that is made, views aside."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor._base is None and not func.is_view:
                self.size = max(self.size, tensor.numel())
        return made
