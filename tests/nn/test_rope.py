"""Angles of the rotary embedding."""

import math

import torch

from tramontane.kernels.reference import rotate
from tramontane.nn.rope import compute_rope


def test_angles_follow_the_formula() -> None:
    rope = compute_rope(torch.tensor([0, 5]), head_dim=8, theta=1e4)
    assert rope.cos.shape == rope.sin.shape == (2, 4)
    for i in range(4):
        angle = 5 * 1e4 ** (-2 * i / 8)
        torch.testing.assert_close(rope.cos[1, i].item(), math.cos(angle), rtol=0, atol=1e-6)
        torch.testing.assert_close(rope.sin[1, i].item(), math.sin(angle), rtol=0, atol=1e-6)
    assert rope.cos[0].tolist() == [1.0] * 4


def test_angles_stay_fp32_in_a_bf16_program() -> None:
    """In bf16 position 257 would be 256: the 8 bits of its fraction end there."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        rope = compute_rope(torch.tensor([256, 257]), head_dim=8, theta=1e4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert rope.cos.dtype == torch.float32
    assert not torch.equal(rope.cos[0], rope.cos[1])


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    scores = []
    for start in (0, 40):
        q_rope = compute_rope(torch.tensor([start + 7]), head_dim=16, theta=1e4)
        k_rope = compute_rope(torch.tensor([start]), head_dim=16, theta=1e4)
        scores.append((rotate(q, *q_rope) * rotate(k, *k_rope)).sum())
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-5)
