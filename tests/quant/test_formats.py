"""Formats and recipes: names, sizes, which parameters, and what is refused."""

from typing import Any

import pytest
import torch

from tests.tiny import make_config
from tramontane.checkpoint.quantized import list_parameters
from tramontane.errors import ConfigError
from tramontane.kernels.packing import GROUP_SIZES, pack
from tramontane.quant.formats import (
    QuantFormat,
    QuantRecipe,
    choose_formats,
    keep_whole_stacks,
    name_packed,
)

FORMATS = [
    QuantFormat(bits, group_size, symmetric)
    for bits in (4, 8)
    for group_size in GROUP_SIZES
    for symmetric in (True, False)
]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_a_name_is_read_back(format: QuantFormat) -> None:
    assert QuantFormat.parse(format.name) == format


def test_short_names_are_groups_of_32_around_zero() -> None:
    assert QuantFormat.parse("int4") == QuantFormat(4, 32, True)
    assert QuantFormat.parse("int8") == QuantFormat(8, 32, True)
    assert QuantFormat.parse("int4-asym").name == "int4-g32-asym"


@pytest.mark.parametrize("name", ["", "int3", "int4-g48", "INT4", "int4-g32-sym", "q4_0", "int40"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        QuantFormat.parse(name)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bits": 3}, r"bits is 3; the kernels have \(4, 8\)"),
        ({"bits": True}, "bits is True"),
        ({"bits": 4.0}, "bits is 4.0"),
        ({"bits": [4]}, r"bits is \[4\]"),
        ({"bits": 4, "group_size": 16}, "group_size is 16"),
        ({"bits": 4, "group_size": "32"}, "group_size is '32'"),
        ({"bits": 4, "symmetric": 1}, "symmetric is 1"),
        ({"bits": 4, "symmetric": None}, "symmetric is None"),
    ],
)
def test_what_the_kernels_lack_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QuantFormat(**values)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(16, 128), (37, 256), (3, 21, 384)])
def test_tensors_are_those_that_packing_makes(format: QuantFormat, shape: tuple[int, ...]) -> None:
    groups = (*shape[:-1], shape[-1] // format.group_size)
    zeros = None if format.symmetric else torch.zeros(groups, dtype=torch.uint8)
    q = torch.zeros(shape, dtype=torch.uint8)
    packed = pack(q, torch.ones(groups), zeros, bits=format.bits)._asdict()
    specs = format.list_tensors(shape)
    for suffix, spec in specs.items():
        assert (tuple(packed[suffix].shape), packed[suffix].dtype) == spec
    assert ("zeros" in specs) == (not format.symmetric)
    sizes = [packed[suffix].nbytes for suffix in specs]
    assert format.count_bytes(shape) == sum(sizes)


def test_bits_per_weight() -> None:
    assert QuantFormat(4).bits_per_weight == 4.5
    assert QuantFormat(8).bits_per_weight == 8.5
    assert QuantFormat(4, 128, False).bits_per_weight == 4.1875
    for format in FORMATS:  # where no rows fill up a block
        assert 8 * format.count_bytes((64, 384)) == format.bits_per_weight * 64 * 384


def test_a_recipe_says_which_parameters() -> None:
    recipe = QuantRecipe.from_format(QuantFormat(4), head=True)
    formats = choose_formats(list_parameters(make_config()), recipe)
    assert formats.pop("output.weight") == QuantFormat(8)
    assert set(formats.values()) == {QuantFormat(4)}
    matrices = [f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")]
    matrices += [f"feed_forward.experts.{w}" for w in ("w1", "w2", "w3")]
    assert set(formats) == {f"layers.{layer}.{name}" for layer in range(2) for name in matrices}


def test_a_dense_model_has_its_network_in_the_place_of_experts() -> None:
    recipe = QuantRecipe(experts=QuantFormat(8))
    formats = choose_formats(list_parameters(make_config(moe=None)), recipe)
    assert {name.rpartition("feed_forward.")[2] for name in formats} == {
        "w1.weight", "w2.weight", "w3.weight",
    }  # fmt: skip


def test_rows_that_do_not_fit_name_parameter_size_and_group() -> None:
    recipe = QuantRecipe.from_format(QuantFormat(4, 64))
    with pytest.raises(ConfigError) as error:
        choose_formats(list_parameters(make_config()), recipe)
    assert "layers.0.feed_forward.experts.w2: rows of 96 values" in str(error.value)
    assert "the group size, 64; choose another group size" in str(error.value)


def test_a_recipe_is_read_back_from_plain_values() -> None:
    recipe = QuantRecipe(experts=QuantFormat(4, 128, False), head=QuantFormat(8))
    assert recipe.to_dict()["experts"] == {"bits": 4, "group_size": 128, "symmetric": False}
    assert recipe.to_dict()["attention"] is None
    assert QuantRecipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "quantises nothing"),
        ({"experts": None}, "quantises nothing"),
        ({"router": {"bits": 4}}, "unknown parts"),
        ({"embeddings": {"bits": 4}}, "unknown parts"),
        ({"experts": 4}, "experts is 4; an object"),
        ({"experts": {"bits": 4}}, "experts is .* belongs there"),
        (
            {"head": {"bits": 2, "group_size": 32, "symmetric": True}},
            r"head: bits is 2; the kernels have \(4, 8\)",
        ),
    ],
)
def test_other_recipes_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        QuantRecipe.from_dict(values)


def test_experts_are_packed_with_all_their_matrices_or_not_at_all() -> None:
    stack = {f"layers.{layer}.feed_forward.experts.w{n}" for layer in (0, 1) for n in (1, 2, 3)}
    names = stack - {"layers.1.feed_forward.experts.w2"} | {
        "layers.0.attention.wq.weight", "tok_embeddings.weight", "norm.weight", "output.weight",
        "layers.0.feed_forward.gate.weight", "layers.0.feed_forward.w1.weight",
    }  # fmt: skip
    kept = keep_whole_stacks(dict.fromkeys(names, QuantFormat(4)))
    assert set(kept) == {name for name in stack if name.startswith("layers.0")} | {
        "layers.0.attention.wq.weight", "output.weight", "layers.0.feed_forward.w1.weight",
    }  # fmt: skip


def test_names_of_packed_tensors() -> None:
    assert name_packed("layers.0.attention.wq.weight", "scales") == "layers.0.attention.wq.scales"
    stack = "layers.3.feed_forward.experts.w2"
    assert name_packed(stack, "qweight") == f"{stack}.qweight"
