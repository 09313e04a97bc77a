"""How much arithmetic training takes, and how much the machine can do: their quotient is the MFU.

Model FLOPs utilisation (arXiv:2204.02311, appendix B): operations that the model itself needs, over
what the machine could have done in the time. What is computed twice counts once.
"""

import math
import time

import torch

from tramontane.config import ModelConfig

_SIZES = {"cpu": 768}  # of the square product: 1 GFLOP; other devices need more to be busy
_LARGE = 8192
_REPEATS = 5


def count_flops_per_token(config: ModelConfig, *, seq_len: int) -> float:
    """Of a training step: 6 per weight in a product, and causal attention's two products.

    Only the experts that a token goes to count. Attention is counted as if documents filled rows of
    `seq_len` tokens; shorter ones need less.
    """
    weights = config.count_parameters().active - config.dim * (2 * config.n_layers + 1)  # norms
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.dim  # embeddings are looked up
    keys = min(seq_len / 2, config.sliding_window or math.inf)
    attention = 2 * 2 * config.n_layers * config.n_heads * config.head_dim * keys
    return 6 * weights + 3 * attention


def measure_peak_flops(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of torch's own square matrix product, best of five: a fraction of a second."""
    size = _SIZES.get(device.type, _LARGE)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_time_product(a, b) for _ in range(_REPEATS + 1))


def _time_product(a: torch.Tensor, b: torch.Tensor) -> float:
    started = time.perf_counter()
    torch.mm(a, b)[0, 0].item()  # waits for the device
    return time.perf_counter() - started
