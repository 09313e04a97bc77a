"""Copies are found, permuted and trained; strangers are not; and what is in between is said."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_config, make_model
from tests.train.test_upcycle import upcycle
from tests.train.trainers import make_trainer
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.eval.ancestry import (
    DERIVED,
    INDEPENDENT,
    Ancestry,
    ModelWeights,
    compare_models,
    match_units,
)
from tramontane.models.transformer import Transformer

DENSE = make_config(moe=None)


def compare(a: Transformer, b: Transformer, **options: Any) -> Ancestry:
    models = (ModelWeights(ParametersInMemory(m.state_dict()), m.config) for m in (a, b))
    return compare_models(*models, **options)


def measure_excess(result: Ancestry) -> list[float]:
    """How far each network is on the way from chance to identity."""
    return [(m.similarity - result.chance) / (1 - result.chance) for m in result.experts]


def train(model: Transformer, out: Path, *, steps: int) -> Transformer:
    trainer = make_trainer(out, model=model, steps=steps, lr=3e-3, loop={"save_every": 0})
    assert trainer.run()
    return model


@torch.no_grad()
def permute(model: Transformer, *, seed: int = 0) -> Transformer:
    """Experts, hidden units and signs in another order: the same function to the eye."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.layers:
        network = layer.feed_forward
        num_experts, num_units, _ = network.experts.w1.shape
        order = torch.randperm(num_experts, generator=generator)
        for weight in (network.gate.weight, *network.experts.parameters()):
            weight.copy_(weight[order])
        experts = network.experts
        for e in range(num_experts):
            units = torch.randperm(num_units, generator=generator)
            signs = torch.randint(2, (num_units, 1), generator=generator) * 2.0 - 1
            scales = torch.rand((num_units, 1), generator=generator) + 0.5
            experts.w1[e] = experts.w1[e][units]
            experts.w3[e] = experts.w3[e][units] * signs * scales
            experts.w2[e] = experts.w2[e][:, units] * (signs / scales).t()
    return model


def test_copies_are_derived() -> None:
    dense = make_model(DENSE)
    result = compare(dense, upcycle(dense))
    assert (result.verdict, result.looked_for) == ("derived", "B")
    assert len(result.experts) == 2 * 8
    assert all(m.similarity == pytest.approx(1, abs=1e-5) for m in result.experts)
    assert all(m.in_order == 1 for m in result.experts)
    assert result.attention == pytest.approx((1, 1))
    assert result.embeddings == pytest.approx(1)
    assert compare(upcycle(dense), dense).verdict == "derived"


def test_permuted_copies_are_the_same_function_and_derived() -> None:
    dense = make_model(DENSE)
    sparse = upcycle(dense)
    tokens = torch.arange(32)
    before = sparse.forward_packed(tokens, (32,)).hidden
    permute(sparse)
    torch.testing.assert_close(sparse.forward_packed(tokens, (32,)).hidden, before)
    result = compare(dense, sparse)
    assert result.verdict == "derived"
    assert min(m.similarity for m in result.experts) > 0.999
    assert max(m.in_order for m in result.experts) < 0.2


@pytest.mark.parametrize("options", [{}, {"noise": 0.3}, {"virtual_groups": 2}], ids=str)
def test_copies_are_found_after_training(tmp_path: Path, options: dict[str, Any]) -> None:
    """Also permuted, and well above the threshold."""
    dense = train(make_model(DENSE), tmp_path / "dense", steps=30)
    sparse = upcycle(dense, **options)
    before = [p.detach().clone() for p in sparse.parameters()]
    permute(train(sparse, tmp_path / "sparse", steps=60))
    pairs = zip(sparse.parameters(), before, strict=True)
    assert any((p - q).norm() > 0.3 * q.norm() for p, q in pairs)
    result = compare(dense, sparse)
    assert result.verdict == "derived"
    assert min(measure_excess(result)) > 1.25 * DERIVED


def test_strangers_are_independent(tmp_path: Path) -> None:
    """Trained on the same text, from other weights; dense and sparse, and both sparse."""
    dense = train(make_model(DENSE, seed=1), tmp_path / "a", steps=30)
    first = train(make_model(make_config(), seed=2), tmp_path / "b", steps=30)
    second = train(make_model(make_config(), seed=3), tmp_path / "c", steps=30)
    for a, b in ((dense, first), (first, second)):
        result = compare(a, b)
        assert result.verdict == "independent"
        assert max(measure_excess(result)) < INDEPENDENT / 2
        assert all(abs(value) < INDEPENDENT / 2 for value in result.attention if value is not None)


def test_two_mixtures_from_one_another(tmp_path: Path) -> None:
    """Each expert finds the one that it was."""
    first = make_model(make_config())
    second = permute(train(make_model(make_config()), tmp_path, steps=20))
    result = compare(first, second)
    assert result.verdict == "derived"
    for layer in range(2):
        partners = [m.partner for m in result.experts if m.layer == layer]
        assert sorted(partners) == list(range(8))
        assert partners != list(range(8))


def test_one_expert_of_a_dense_model_among_strangers() -> None:
    dense, sparse = make_model(DENSE, seed=1), make_model(make_config(), seed=2)
    for layer, source in zip(sparse.layers, dense.layers, strict=True):
        for name in ("w1", "w2", "w3"):
            stack = getattr(layer.feed_forward.experts, name)
            stack.data[5] = getattr(source.feed_forward, name).weight.data
    result = compare(dense, sparse)
    assert result.verdict == "partly derived"
    assert result.reason.startswith("2 of 16 networks")
    alike = [m.expert for m in result.experts if m.similarity > 0.99]
    assert alike == [5, 5]


def test_attention_alone_is_partly_derived() -> None:
    dense, sparse = make_model(DENSE, seed=1), make_model(make_config(), seed=2)
    for layer, source in zip(sparse.layers, dense.layers, strict=True):
        layer.attention.load_state_dict(source.attention.state_dict())
    result = compare(dense, sparse)
    assert result.verdict == "partly derived"
    assert result.reason.endswith("attention is alike")


def test_what_lies_between_is_unclear() -> None:
    dense = make_model(DENSE, seed=1)
    mixed = make_model(DENSE, seed=2)
    for a, b in zip(mixed.parameters(), dense.parameters(), strict=True):
        a.data += 0.3 * b.data
    assert compare(dense, mixed).verdict == "unclear"


def test_other_shapes() -> None:
    dense = make_model(DENSE)
    narrow = make_model(make_config(moe=None, dim=32))
    result = compare(dense, narrow)
    assert result.verdict == "independent"
    assert result.reason.startswith("dim is 64 and 32")
    shorter = make_model(make_config(moe=None, n_layers=1, n_kv_heads=4, vocab_size=100))
    result = compare(dense, shorter)
    assert result.attention == (None,)
    assert result.embeddings is not None
    assert "of 2 and 1 layers the first 1" in result.reason


def test_chance_is_what_random_networks_have() -> None:
    result = compare(make_model(DENSE, seed=1), make_model(DENSE, seed=2))
    for match in result.experts:
        assert match.similarity == pytest.approx(result.chance, abs=0.03)


def test_matching_is_one_to_one_and_the_best_pair_goes_first() -> None:
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.95, 0.2, 0.3], [0.1, 0.6, 0.0]])
    mean, columns = match_units(similarity)
    assert columns.tolist() == [2, 0, 1]
    assert mean == pytest.approx((0.1 + 0.95 + 0.6) / 3)
