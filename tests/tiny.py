"""The toy size that tests run at: vocabulary 128, dim 64, 2 layers, 4 heads over 2, 8 experts."""

from typing import Any

import torch
from torch import nn

from tramontane.config import ModelConfig, MoeConfig
from tramontane.models.transformer import Transformer, build_model


def make_config(**changes: Any) -> ModelConfig:
    """A small Mixtral; `moe=None` makes it a Mistral."""
    values: dict[str, Any] = {
        "dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2,
        "vocab_size": 128, "rope_theta": 1e4, "max_seq_len": 256, "moe": MoeConfig(),
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def make_model(config: ModelConfig | None = None, *, seed: int = 0) -> Transformer:
    """A model with logits of order one; those of a fresh one are close to zero."""
    model = build_model(config or make_config())
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        randomize_(parameter, generator)
    return model.eval()


@torch.no_grad()
def randomize_(parameter: nn.Parameter, generator: torch.Generator) -> None:
    """Norm weights near one, matrices with variance 1 / fan-in."""
    if parameter.ndim == 1:
        parameter.normal_(1.0, 0.1, generator=generator)
    else:
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def make_tokens(count: int, *, seed: int = 0, vocab_size: int = 128) -> torch.Tensor:
    """Random token ids (count,) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator)
