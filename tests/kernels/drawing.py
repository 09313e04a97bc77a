"""Random tensors, packed weights and routings, the same for the same seed."""

import torch
from torch import Tensor

from tramontane.kernels import reference
from tramontane.kernels.packing import PackedWeight, pack


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def draw_weight(
    *shape: int, bits: int, group_size: int = 32, symmetric: bool = True, seed: int = 0
) -> PackedWeight:
    """Any q and zero points, the extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    q[..., 0], q[..., -1] = 0, 2**bits - 1
    groups = (*shape[:-1], shape[-1] // group_size)
    scales = torch.rand(groups, generator=generator).half() * 0.1
    zeros = None
    if not symmetric:
        zeros = torch.randint(0, 2**bits, groups, generator=generator, dtype=torch.uint8)
    return pack(q, scales, zeros, bits=bits)


def draw_routing(
    num_tokens: int, num_experts: int, num_slots: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    logits = draw(num_tokens, num_experts, seed=seed)
    return reference.top_k_routing(logits, num_slots)
