"""Packed weights: the order of their bytes, and back, for every size that a matrix may have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles.quantized import read_values
from tramontane.errors import ConfigError
from tramontane.kernels.packing import (
    GROUP_SIZES,
    PackedWeight,
    default_zero,
    dequantize,
    pack,
    unpack,
)


def draw(
    shape: tuple[int, ...], *, bits: int, group_size: int = 32, symmetric: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random q, scales and zeros of a matrix or a stack; scales of both signs, as Q4_0 has them."""
    generator = torch.Generator().manual_seed(0)
    groups = (*shape[:-1], shape[-1] // group_size)
    q = torch.randint(1 << bits, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randn(groups, generator=generator).half()
    zeros = torch.randint(1 << bits, groups, generator=generator, dtype=torch.uint8)
    return q, scales, None if symmetric else zeros


@settings(max_examples=40)
@given(
    num_rows=st.integers(1, 50),
    num_groups=st.integers(1, 3),
    stack=st.sampled_from([(), (1,), (3,), (2, 2)]),
    group_size=st.sampled_from(GROUP_SIZES),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
)
def test_there_and_back(
    num_rows: int,
    num_groups: int,
    stack: tuple[int, ...],
    group_size: int,
    bits: int,
    symmetric: bool,
) -> None:
    shape = (*stack, num_rows, num_groups * group_size)
    q, scales, zeros = draw(shape, bits=bits, group_size=group_size, symmetric=symmetric)
    packed = pack(q, scales, zeros, bits=bits)
    assert (packed.group_size, packed.in_features) == (group_size, shape[-1])
    assert torch.equal(unpack(packed), q)
    zero = default_zero(bits) if zeros is None else zeros.repeat_interleave(group_size, -1).float()
    expected = scales.float().repeat_interleave(group_size, -1) * (q.float() - zero)
    assert torch.equal(dequantize(packed), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_each_value_lies_where_the_documents_say(
    bits: int, group_size: int, symmetric: bool
) -> None:
    shape = (3, 21, 256)
    packed = pack(*draw(shape, bits=bits, group_size=group_size, symmetric=symmetric), bits=bits)
    assert torch.equal(dequantize(packed), torch.from_numpy(read_values(packed)))
    assert torch.equal(dequantize(packed.select(1)), dequantize(packed)[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_that_fill_the_last_block_are_zero(bits: int, symmetric: bool) -> None:
    packed = pack(*draw((21, 64), bits=bits, symmetric=symmetric), bits=bits)
    assert packed.qweight.shape == (2, 64 * bits // 32, 16, 4)
    assert packed.scales.shape == (2, 2, 16)
    assert packed.qweight.is_contiguous()
    whole = packed._replace(out_features=32)
    assert torch.equal(dequantize(whole)[:21], dequantize(packed))
    assert not dequantize(whole)[21:].any()
    assert (packed.scales[1, :, 5:] == 0).all()
    assert (unpack(whole)[21:] == default_zero(bits)).all()


def test_the_example_of_the_documents() -> None:
    q = torch.arange(1, 33, dtype=torch.uint8)[None] % 16
    packed = pack(q, torch.ones(1, 1), None, bits=4)
    assert packed.qweight[0, 0, 0].tolist() == [0x51, 0x62, 0x73, 0x84]
    assert packed.qweight[0, 1, 0].tolist() == [0xD9, 0xEA, 0xFB, 0x0C]
    assert packed.qweight[0, 0, 1].tolist() == [0x88] * 4


@pytest.mark.parametrize(
    ("in_features", "num_groups", "said"),
    [
        (48, 1, "the group size is 48; the kernels have"),
        (16, 1, "the group size is 16"),
        (64, 3, "3 scales do not divide rows of 64 values"),
        (256, 1, "the group size is 256"),
    ],
)
def test_rows_that_no_kernel_has_are_refused(in_features: int, num_groups: int, said: str) -> None:
    q = torch.zeros(4, in_features, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=said):
        pack(q, torch.ones(4, num_groups), None, bits=8)


def test_a_weight_is_a_plain_tuple_for_the_kernels() -> None:
    qweight, scales, zeros, bits, out_features = pack(*draw((5, 32), bits=8), bits=8)
    assert isinstance(PackedWeight(qweight, scales, zeros, bits, out_features), tuple)
    assert (qweight.dtype, scales.dtype, zeros, bits, out_features) == (
        torch.uint8, torch.float16, None, 8, 5,
    )  # fmt: skip
