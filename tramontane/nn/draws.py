"""A module's own random numbers: nothing else in the process shifts them, and a run can go on.

The numbers of a draw follow from a seed, the module, and how many draws there were before.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import nn


class Draws:
    """The random numbers of one module, which `stream` tells from others of the model."""

    def __init__(self, *stream: int) -> None:
        self.stream, self.seed, self.count = stream, 0, 0

    def next_generator(self, device: torch.device) -> torch.Generator:
        """The generator of the next draw."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(*self.stream, self.count))
        (word,) = sequence.generate_state(1, np.uint64)
        self.count += 1
        generator = torch.Generator(device)
        generator.manual_seed(int(word) >> 1)  # a signed number of 64 bits
        return generator


def seed_draws(model: nn.Module, seed: int) -> None:
    """Let all of `model` draw what follows from `seed`, from the beginning."""
    for _, draws in _find_draws(model):
        draws.seed, draws.count = seed, 0


def read_draws(model: nn.Module) -> dict[str, list[int]]:
    """Seed and count of each module that draws, by its name; plain JSON values."""
    return {name: [draws.seed, draws.count] for name, draws in _find_draws(model)}


def restore_draws(model: nn.Module, states: Mapping[str, list[int]]) -> None:
    """Go on where `read_draws` was; a module that is not in `states` begins."""
    for name, draws in _find_draws(model):
        draws.seed, draws.count = states.get(name, [draws.seed, 0])


def _find_draws(model: nn.Module) -> Iterator[tuple[str, Draws]]:
    for name, module in model.named_modules():
        if isinstance(draws := getattr(module, "draws", None), Draws):
            yield name, draws
