"""Soft MoE (arXiv:2308.00951): its equations, its cost, and why it cannot be causal."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from tests.tiny import make_config, randomize_
from tramontane.config import MoeConfig
from tramontane.config.moe import SoftOptions
from tramontane.errors import ConfigError
from tramontane.nn.soft_moe import SoftMoe

DIM, HIDDEN = 6, 5


def make_layer(*, num_experts: int = 3, slots: int = 2) -> SoftMoe:
    config = make_config(dim=DIM, hidden_dim=HIDDEN, head_dim=2, n_heads=2, n_kv_heads=1)
    moe = MoeConfig(num_experts, 1, router="soft", router_options=SoftOptions(slots))
    layer = SoftMoe(config, moe, causal=False)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        if parameter.dim():
            randomize_(parameter, generator)
    return layer.double()


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@torch.no_grad()
def test_it_equals_the_equations_of_the_paper() -> None:
    """D, C, slots and outputs, written out for one sequence, section 2.1 and equation 5."""
    layer = make_layer()
    layer.scale.fill_(3.0)
    x = draw(1, 7, DIM)
    logits = torch.empty(7, 6, dtype=torch.float64)
    for t in range(7):
        for slot in range(6):
            phi = layer.phi[:, slot]
            logits[t, slot] = 3.0 * F.cosine_similarity(x[0, t], phi, dim=0)
    dispatch = logits.exp() / logits.exp().sum(0)
    combine = logits.exp() / logits.exp().sum(1, keepdim=True)
    outputs = []
    for slot, mixture in enumerate(dispatch.t() @ x[0]):
        w1, w2, w3 = (w[slot // 2] for w in (layer.experts.w1, layer.experts.w2, layer.experts.w3))
        outputs.append(w2 @ (F.silu(w1 @ mixture) * (w3 @ mixture)))
    torch.testing.assert_close(layer(x)[0], combine @ torch.stack(outputs))


@torch.no_grad()
def test_without_preferences_all_tokens_and_slots_count_alike() -> None:
    """S-15: Phi = 0 gives D = 1/m and C = 1/(n p)."""
    layer = make_layer()
    layer.phi.zero_()
    x = draw(2, 7, DIM)
    logits = layer.score(x)
    assert (torch.softmax(logits, 1) - 1 / 7).abs().max() < 1e-12
    assert (torch.softmax(logits, 2) - 1 / 6).abs().max() < 1e-12
    torch.testing.assert_close(layer(x), layer(x)[:, :1].expand_as(x))


def test_gradcheck_in_float64() -> None:
    layer = make_layer()
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [v.detach().clone().requires_grad_() for v in (draw(2, 4, DIM), *values)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@torch.no_grad()
def test_experts_work_on_slots_however_many_tokens_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """S-15: no token is dropped, and the rows of the experts are n p for each sequence."""
    layer, rows = make_layer(), []
    run = layer.experts.forward
    monkeypatch.setattr(layer.experts, "forward", lambda x, r: rows.append(len(x)) or run(x, r))
    for num_tokens in (1, 10, 100):
        layer(draw(2, num_tokens, DIM))
    assert rows == [12, 12, 12]


@torch.no_grad()
def test_a_later_token_changes_an_earlier_one() -> None:
    """S-15: why a causal model cannot have it."""
    layer, x = make_layer(), draw(1, 7, DIM)
    changed = x.clone()
    changed[0, 6] += 1.0
    assert (layer(changed)[0, 0] - layer(x)[0, 0]).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="mixture of all tokens of a sequence"):
        SoftMoe(make_config(), MoeConfig(router="soft"), causal=True)


def test_it_takes_no_other_router() -> None:
    with pytest.raises(ConfigError, match="'top_k'"):
        SoftMoe(make_config(), MoeConfig(), causal=False)
