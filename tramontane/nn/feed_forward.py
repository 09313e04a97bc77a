"""The dense SwiGLU feed-forward network of Mistral (arXiv:2002.05202)."""

from torch import Tensor, nn

from tramontane.config import ModelConfig
from tramontane.kernels.dispatch import get_kernels
from tramontane.nn.linear import Linear


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x), without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)
        self.w3 = Linear(config.dim, config.hidden_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x (T, D) -> (T, D), and no routing."""
        return self.w2(get_kernels().swiglu(self.w1(x), self.w3(x))), None
