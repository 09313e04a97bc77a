"""The model in one native call gives the bits of its own forward pass, whatever the batch."""

from collections.abc import Callable

import pytest
import torch

from tests.engine.paged import PagedSequences
from tests.engine.sequences import finish_all, generate, make_engine, make_sequence
from tests.tiny import make_config, make_model, make_tokens
from tramontane.config import ModelConfig, MoeConfig
from tramontane.engine.native_model import (
    NativeModel,
    build_native_model,
    list_tensor_states,
)
from tramontane.kernels.native_decoder import DecoderResults
from tramontane.models.transformer import ForwardOutput, Transformer
from tramontane.nn.attention import Attention
from tramontane.quant.apply import quantize_model
from tramontane.quant.formats import QuantFormat, QuantRecipe

# Tokens that each of three sequences runs in one pass after another; 0 is not in it.
PASSES = [(5, 1, 17), (1, 1, 1), (0, 30, 1), (1, 3, 0), (20, 1, 1)]


@pytest.fixture(autouse=True)
def _native(choose_kernels: Callable[[str], None]) -> None:
    choose_kernels("native")


def run_both(model: Transformer) -> list[tuple[DecoderResults, ForwardOutput]]:
    """All passes, natively and by the model itself, each with caches of its own."""
    native = build_native_model(model)
    assert native is not None
    ours, theirs = (PagedSequences(model, count=3, max_tokens=64) for _ in range(2))
    outputs = []
    for number, seqlens in enumerate(PASSES):
        tokens = make_tokens(sum(seqlens), seed=number)
        output = ours.run_natively(native, tokens, seqlens)
        assert output is not None
        outputs.append((output, theirs.run(tokens, seqlens)))
    assert ours.lengths == theirs.lengths == [27, 36, 20]
    return outputs


def assert_same_bits(model: Transformer) -> None:
    with torch.inference_mode():
        for output, expected in run_both(model):
            assert torch.equal(output.hidden, expected.hidden)
            assert torch.equal(output.logits, model.compute_logits(expected.hidden))
            assert torch.equal(output.next_tokens[0], output.logits.argmax(1))
            ours = zip(output.weights, output.experts[0], output.router_logits, strict=True)
            for routing, theirs in zip(ours, expected.routing, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(routing, theirs[:3], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 20}, {"n_kv_heads": 1}], ids=str)
def test_plain(dtype: torch.dtype, changes: dict[str, int]) -> None:
    assert_same_bits(make_model(make_config(**changes)).to(dtype))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(bits: int) -> None:
    config = make_config(dim=64, hidden_dim=96, head_dim=16)
    model = make_model(config).bfloat16()
    quantize_model(model, QuantRecipe.from_format(QuantFormat(bits)))
    assert_same_bits(model)


def test_a_model_that_was_cast_is_not_for_it_any_more() -> None:
    model = make_model(make_config())
    native = build_native_model(model)
    assert native is not None
    cache = PagedSequences(model)
    model.double()
    assert cache.run_natively(native, make_tokens(3), [3]) is None


def replace_weight(model: Transformer) -> None:
    wq = model.layers[0].attention.wq
    wq.weight = torch.nn.Parameter(wq.weight.detach().clone())


def assign_weights(model: Transformer) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def merge_in_place(model: Transformer) -> None:
    wq = model.layers[0].attention.wq
    wq.weight.data = wq.weight.data + 1


@torch.no_grad()
def step_in_place(model: Transformer) -> None:
    model.layers[0].attention.wq.weight.add_(1)


CHANGES = [replace_weight, assign_weights, merge_in_place, step_in_place]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moe", [MoeConfig(), None], ids=["sparse", "dense"])
def test_nothing_is_kept_of_other_weights(
    change: Callable[[Transformer], None], moe: MoeConfig | None
) -> None:
    """Not the beginning of a prompt either: its keys and values are those of before."""
    model, prompt = make_model(make_config(moe=moe)), make_tokens(40).tolist()
    engine = make_engine(model)
    finish_all(engine, make_sequence(prompt))
    change(model)
    [completion] = finish_all(engine, make_sequence(prompt))
    assert list(completion.token_ids) == generate(model, prompt)
    assert completion.num_cached_tokens == 0
    [completion] = finish_all(engine, make_sequence(prompt))
    assert completion.num_cached_tokens == 32


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_with_other_weights_is_another(change: Callable[[Transformer], None]) -> None:
    """The engine looks before each request; what runs reads memory that is still there."""
    model = make_model(make_config())
    native, before = build_native_model(model), list_tensor_states(model)
    assert native is not None
    assert list_tensor_states(model) == before
    change(model)
    assert list_tensor_states(model) != before
    with torch.inference_mode():
        assert PagedSequences(model).run_natively(native, make_tokens(3), [3]) is not None


def test_there_is_no_such_token() -> None:
    model = make_model(make_config())
    native, cache = build_native_model(model), PagedSequences(model)
    assert native is not None
    for token in (-1, model.config.vocab_size):
        with pytest.raises(IndexError, match="no such token"):
            cache.run_natively(native, torch.tensor([token]), [1])


class OtherAttention(Attention):
    """Computes something else, for all that is known."""


def use_other_attention(model: Transformer) -> None:
    model.layers[1].attention = OtherAttention(model.config)


def use_hook(model: Transformer) -> None:
    model.layers[0].attention.wo.register_forward_hook(lambda *_: None)


def use_fewer_experts(model: Transformer) -> None:
    model.layers[0].feed_forward.gate.num_experts_per_tok = 1


def use_fp16_experts(model: Transformer) -> None:
    model.layers[0].feed_forward.experts.half()


CHANGES = [use_other_attention, use_hook, use_fewer_experts, use_fp16_experts]


@pytest.mark.parametrize("change", CHANGES)
def test_modules_of_another_kind_are_not_for_it(change: Callable[[Transformer], None]) -> None:
    model = make_model(make_config())
    change(model)
    assert build_native_model(model) is None


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
