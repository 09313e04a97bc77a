"""Random weights to start from."""

import torch
from torch import nn

from tramontane.models.transformer import Transformer


@torch.no_grad()
def initialize_weights(model: Transformer, *, seed: int) -> None:
    """Normal weights of deviation 0.02; those that write to the residual stream / sqrt(2 layers).

    Source: GPT-2. Norms start at one. The generator is private, so nothing else shifts the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    residual_std = 0.02 / (2 * model.config.n_layers) ** 0.5
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        writes_to_residual = name.endswith(("attention.wo.weight", "w2", "w2.weight"))
        std = residual_std if writes_to_residual else 0.02
        nn.init.normal_(parameter, std=std, generator=generator)
