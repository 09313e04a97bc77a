"""Weights of 8 or 4 bits in the order in which the kernels read them, and the way back.

Shapes: N rows and K columns of a matrix, g values of a row under one scale, NB = ceil(N / 16)
blocks of 16 rows; `...` is nothing or E experts. The 16 rows of a block are the lanes of a vector
register; 4 neighbours of a row are the 4 bytes that one VNNI or AMX instruction sums in a lane.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tramontane.errors import ConfigError

LANES = 16  # rows of a block
QUAD = 4  # values of one row that lie together
GROUP_SIZES = (32, 64, 128)


class PackedWeight(NamedTuple):
    """A matrix (N, K), or a stack of E of them: value = scale * (q - zero), q without a sign.

    8 bits: `qweight` (..., NB, K/4, 16, 4) uint8 has at [nb, kq, lane, j] the value
    q[nb*16 + lane, kq*4 + j].
    4 bits: `qweight` (..., NB, K/8, 16, 4) uint8 has at [nb, kb, lane, j] two values of the row
    nb*16 + lane: q[kb*8 + j] in the low half of the byte, q[kb*8 + 4 + j] in the high half.
    `scales` (..., NB, K/g, 16) is fp16. `zeros` (..., NB, K/g, 16) is uint8; None means 128 for 8
    bits and 8 for 4 bits. Rows beyond N fill the last block: q is the zero point, the scale 0.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    out_features: int

    @property
    def in_features(self) -> int:
        """K, from the shape."""
        return self.qweight.shape[-3] * QUAD * (8 // self.bits)

    @property
    def group_size(self) -> int:
        """g, from the shapes."""
        return self.in_features // self.scales.shape[-2]

    def select(self, expert: int) -> "PackedWeight":
        """One matrix of a stack, as views."""
        zeros = None if self.zeros is None else self.zeros[expert]
        return self._replace(qweight=self.qweight[expert], scales=self.scales[expert], zeros=zeros)


def default_zero(bits: int) -> int:
    """The zero point of all groups where none is stored: the middle of 0 .. 2^bits - 1."""
    return 1 << (bits - 1)


def check_rows(in_features: int, *, group_size: int) -> None:
    """Raise ConfigError unless rows of K values can be cut into groups of `group_size`."""
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"the group size is {group_size}; the kernels have {GROUP_SIZES}")
    if in_features < 1 or in_features % group_size:
        raise ConfigError(
            f"rows of {in_features} values are not a multiple of the group size, {group_size}"
        )


def pack(q: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int) -> PackedWeight:
    """Put q (..., N, K) uint8 with scales (..., N, K/g) and zeros (alike, or None) in order.

    With 4 bits the values 1 2 3 4 5 6 7 8 of a row become the bytes 0x51 0x62 0x73 0x84 of its
    lane. Raises ConfigError if K is not a multiple of g, or g is none of the kernels' sizes.
    """
    assert bits in (4, 8), bits
    num_rows, in_features = q.shape[-2:]
    num_groups = max(1, scales.shape[-1])
    if in_features % num_groups:
        raise ConfigError(f"{num_groups} scales do not divide rows of {in_features} values")
    check_rows(in_features, group_size=in_features // num_groups)
    blocks = _cut_blocks(q, fill=default_zero(bits))  # (..., NB, 16, K)
    quads = blocks.unflatten(-1, (-1, QUAD)).transpose(-2, -3)  # (..., NB, K/4, 16, 4)
    if bits == 4:
        quads = quads[..., 0::2, :, :] | (quads[..., 1::2, :, :] << 4)  # (..., NB, K/8, 16, 4)
    return PackedWeight(
        quads.contiguous(),
        _order_groups(scales.half(), fill=0),
        None if zeros is None else _order_groups(zeros, fill=default_zero(bits)),
        bits,
        num_rows,
    )


def unpack(weight: PackedWeight) -> Tensor:
    """q (..., N, K) uint8, as it was given to `pack`."""
    quads = weight.qweight
    if weight.bits == 4:
        halves = torch.stack((quads & 15, quads >> 4), dim=-3)  # (..., NB, K/8, 2, 16, 4)
        quads = halves.flatten(-4, -3)  # (..., NB, K/4, 16, 4)
    blocks = quads.transpose(-2, -3).flatten(-2)  # (..., NB, 16, K)
    return blocks.flatten(-3, -2)[..., : weight.out_features, :]


def dequantize(weight: PackedWeight) -> Tensor:
    """The values (..., N, K), in fp32."""
    q = unpack(weight).float().unflatten(-1, (-1, weight.group_size))  # (..., N, K/g, g)
    scales = _list_groups(weight.scales, weight.out_features).float()  # (..., N, K/g)
    if weight.zeros is None:
        q.sub_(default_zero(weight.bits))
    else:
        q.sub_(_list_groups(weight.zeros, weight.out_features)[..., None])
    return q.mul_(scales[..., None]).flatten(-2)


def _cut_blocks(rows: Tensor, *, fill: int) -> Tensor:
    """(..., N, C) -> (..., NB, 16, C), the last block filled up."""
    missing = -rows.shape[-2] % LANES
    if missing:
        filling = rows.new_full((*rows.shape[:-2], missing, rows.shape[-1]), fill)
        rows = torch.cat((rows, filling), dim=-2)
    return rows.unflatten(-2, (-1, LANES))


def _order_groups(groups: Tensor, *, fill: int) -> Tensor:
    """(..., N, K/g) -> (..., NB, K/g, 16)."""
    return _cut_blocks(groups, fill=fill).transpose(-1, -2).contiguous()


def _list_groups(ordered: Tensor, num_rows: int) -> Tensor:
    """(..., NB, K/g, 16) -> (..., N, K/g)."""
    return ordered.transpose(-1, -2).flatten(-3, -2)[..., :num_rows, :]
