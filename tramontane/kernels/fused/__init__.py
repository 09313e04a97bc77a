"""The kernels of `reference.py` with hand-written backward passes, in torch, for any device.

Each equals its namesake there. They are faster because intermediate results are few, stay in the
cache, and return to slot order by a gather.
"""

from tramontane.kernels.fused.attention import (
    causal_attention,
    packed_attention,
    paged_attention,
)
from tramontane.kernels.fused.cross_entropy import linear_cross_entropy
from tramontane.kernels.fused.elementwise import rms_norm, rotate
from tramontane.kernels.fused.experts import moe_experts
from tramontane.kernels.reference import (
    is_finite,
    linear,  # torch differentiates it well
    quantized_experts,  # not differentiated, and the native kernels' to make fast
    quantized_linear,
    sample_tokens,
    store_paged,
    swiglu,  # torch differentiates it well
    top_k_router,
    top_k_routing,  # short already
)

__all__ = [
    "causal_attention",
    "is_finite",
    "linear",
    "linear_cross_entropy",
    "moe_experts",
    "packed_attention",
    "paged_attention",
    "quantized_experts",
    "quantized_linear",
    "rms_norm",
    "rotate",
    "sample_tokens",
    "store_paged",
    "swiglu",
    "top_k_router",
    "top_k_routing",
]
