"""Q01: a quantised model against a plain one with the same values; what is swapped, what stays."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bounds import measure_error
from tests.oracles.quantized import dequantize_model
from tests.tiny import make_config, make_model, make_tokens
from tramontane.config import MoeConfig
from tramontane.errors import ConfigError
from tramontane.models.transformer import Transformer, build_model
from tramontane.nn.experts import GroupedExperts
from tramontane.nn.linear import Linear
from tramontane.quant.apply import ModelPacker, quantize_model
from tramontane.quant.formats import QuantFormat, QuantRecipe
from tramontane.quant.modules import PackedMatrix, QuantizedExperts, QuantizedLinear

# Largest difference of logits, relative to the largest. Rounding the activations to 8 bits costs
# the first, where that cannot choose other experts; against an oracle that rounds them too, what
# remains is the order of the sums and the values that it sends to the next whole number.
_ROUNDING, _SUMS = 0.04, 5e-3
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_dim": 128},
    "every expert": {"hidden_dim": 128, "moe": MoeConfig(3, 3)},
    "mistral": {"hidden_dim": 128, "moe": None},
    "tied": {"hidden_dim": 128, "tie_embeddings": True},
}
_FORMATS = [QuantFormat(4), QuantFormat(4, 64, False), QuantFormat(8), QuantFormat(8, 64, False)]


def make(kind: str = "mixtral") -> Transformer:
    """A tiny model; the head of a tied one is the embeddings."""
    model = make_model(make_config(**KINDS[kind]))
    if model.config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    return model


@torch.no_grad()
def compute_logits(model: Transformer) -> Tensor:
    tokens = make_tokens(24)
    return model.compute_logits(model.forward_packed(tokens, [15, 9]).hidden)


@pytest.mark.parametrize("format", _FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("kind", KINDS)
def test_q01_all_parts_against_the_dequantised_oracle(kind: str, format: QuantFormat) -> None:
    model = make(kind)
    quantize_model(model, QuantRecipe.from_format(format, head=True))
    logits = compute_logits(model)
    if model.config.moe is None or model.config.moe.num_experts == 3:
        assert measure_error(logits, compute_logits(dequantize_model(model))) < _ROUNDING
    assert measure_error(logits, compute_logits(dequantize_model(model, rounds=True))) < _SUMS


def test_q01_all_experts_in_4_bits_and_the_gate_in_none() -> None:
    """Router, norms and embeddings are the same tensors as before, in no fewer bits than bf16."""
    model = make("every expert").bfloat16()
    before = dict(model.named_parameters())
    quantize_model(model, QuantRecipe(experts=QuantFormat(4)))
    after = dict(model.named_parameters())
    experts = {f"layers.{i}.feed_forward.experts.w{n}" for i in (0, 1) for n in (1, 2, 3)}
    assert set(after) == set(before) - experts
    assert all(after[name] is before[name] for name in after)
    assert after["layers.1.feed_forward.gate.weight"].dtype == torch.bfloat16
    logits = compute_logits(model)
    assert measure_error(logits, compute_logits(dequantize_model(model))) < _ROUNDING


def test_fewer_bits_are_further_from_the_model() -> None:
    expected = compute_logits(make("every expert"))
    errors = []
    for format in (QuantFormat(8), QuantFormat(4), QuantFormat(4, 64)):
        model = make("every expert")
        quantize_model(model, QuantRecipe.from_format(format))
        errors.append((compute_logits(model) - expected).norm().item())
    assert errors == sorted(errors)
    assert errors[0] < 0.03 * expected.norm()


def test_modules_hold_buffers_and_say_what_they_are() -> None:
    model = make()
    quantize_model(model, QuantRecipe.from_format(QuantFormat(4), head=True))
    layer = model.layers[0]
    assert isinstance(layer.attention.wk, QuantizedLinear)
    assert isinstance(layer.feed_forward.experts, QuantizedExperts)
    assert isinstance(model.output, QuantizedLinear)
    assert repr(layer.attention.wk) == "QuantizedLinear(int4-g32, 32 x 64)"
    assert "(w2): PackedMatrix(int4-g32, 8 x 64 x 128)" in repr(layer.feed_forward.experts)
    assert not layer.feed_forward.experts.training
    assert not any(True for _ in layer.feed_forward.experts.parameters())
    state = model.state_dict()
    assert state["layers.0.attention.wk.qweight"].dtype == torch.uint8
    assert state["layers.0.feed_forward.experts.w2.scales"].shape == (8, 4, 4, 16)
    other = make()
    quantize_model(other, QuantRecipe.from_format(QuantFormat(4), head=True))
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(state)
    assert torch.equal(compute_logits(other), compute_logits(model))


def test_leading_dimensions_are_kept() -> None:
    linear = QuantizedLinear((24, 64), QuantFormat(8))
    linear.store(ModelPacker({}).pack(torch.randn(24, 64), QuantFormat(8)))
    x = torch.randn(2, 3, 64)
    assert torch.allclose(linear(x), linear(x.flatten(0, 1)).view(2, 3, 24))
    assert linear(x[0, 0]).shape == (24,)
    assert linear(x[:, :0]).shape == (2, 0, 24)


def test_progress_counts_the_bytes_that_are_held() -> None:
    model, seen = make(), {}
    quantize_model(model, QuantRecipe.from_format(QuantFormat(8)), on_tensor=seen.__setitem__)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert sum(seen.values()) == buffers
    assert len(seen) == 2 * (4 + 3)


def test_nothing_changes_if_one_matrix_does_not_fit() -> None:
    model = make_model(make_config(hidden_dim=96))
    with pytest.raises(ConfigError, match=r"experts.w2: rows of 96 values .* group size, 64"):
        quantize_model(model, QuantRecipe.from_format(QuantFormat(4, 64)))
    assert not any(isinstance(module, PackedMatrix) for module in model.modules())


def test_weights_that_are_not_finite_are_named() -> None:
    model = make()
    model.layers[1].feed_forward.experts.w3.data[5, 3, 2] = float("nan")
    with pytest.raises(ConfigError, match=r"layers.1.feed_forward.experts.w3: rows 0 and after"):
        quantize_model(model, QuantRecipe.from_format(QuantFormat(4)))


def test_only_linear_layers_and_whole_experts_are_swapped() -> None:
    int4 = QuantFormat(4)
    stack = "layers.0.feed_forward.experts"
    for formats, said in (
        ({"tok_embeddings.weight": int4}, "tok_embeddings.weight cannot .* in a Embedding"),
        ({"layers.0.feed_forward.gate.weight": int4}, "gate.weight cannot .* in a TopKRouter"),
        ({"norm.weight": int4}, "in a RMSNorm"),
        ({"head.weight": int4}, "head.weight cannot be quantised: it is not there"),
        ({f"{stack}.w1": int4, f"{stack}.w2": int4}, r"but \['w3'\] beside it has none"),
    ):
        with pytest.raises(ConfigError, match=said):
            ModelPacker(formats).swap(build_model(make_config(), device="meta"))
    biased = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ConfigError, match=r"0.weight cannot"):
        ModelPacker({"0.weight": int4}).swap(biased)


def test_any_model_of_such_modules_will_do() -> None:
    """Modules are told by their type: a model of another family needs nothing here."""
    model = nn.ModuleDict({"mixer": nn.ModuleDict({"wq": nn.Linear(64, 20, bias=False)})})
    weight = model["mixer"]["wq"].weight.detach().clone()
    quantize_model(model, QuantRecipe(attention=QuantFormat(8)))
    x = torch.randn(5, 64)
    assert measure_error(model["mixer"]["wq"](x), x @ weight.t()) < 0.02


def test_a_swapped_model_has_shapes_alone() -> None:
    """On the device "meta" nothing is allocated, and each stack may have a format of its own."""
    model = build_model(make_config(), device="meta")
    stack = "layers.0.feed_forward.experts"
    formats = {f"{stack}.w1": QuantFormat(4), f"{stack}.w2": QuantFormat(8),
               f"{stack}.w3": QuantFormat(4, 64), "output.weight": QuantFormat(8)}  # fmt: skip
    ModelPacker(formats).swap(model)
    experts = model.layers[0].feed_forward.experts
    assert [m.format for m in (experts.w1, experts.w2, experts.w3)] == [
        QuantFormat(4), QuantFormat(8), QuantFormat(4, 64),
    ]  # fmt: skip
    assert all(buffer.is_meta for buffer in model.buffers())
    assert isinstance(model.layers[1].feed_forward.experts, GroupedExperts)
    assert isinstance(model.layers[0].attention.wq, Linear)
