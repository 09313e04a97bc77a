"""A model folder at toy size: random weights and a tokenizer with one token for each byte."""

import shutil
from pathlib import Path
from typing import Any

import torch

from tests.tiny import make_config, make_model
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.checkpoint.writer import save_model, write_mistral
from tramontane.tokenizer.tokenizer import Tokenizer
from tramontane.tokenizer.trainer import train_tokenizer

VOCAB_SIZE = 3 + 256


def make_tokenizer() -> Tokenizer:
    """Control tokens and the 256 bytes, so that every character beyond ASCII spans tokens."""
    return train_tokenizer(["a"], vocab_size=VOCAB_SIZE)


def save_tiny_model(folder: Path, *, generation_config: str | None = None, **changes: Any) -> Path:
    """Save a fp32 model of `make_config(**changes)` in the new folder; returns its path."""
    model = make_model(make_config(vocab_size=VOCAB_SIZE, **changes))
    extra = {} if generation_config is None else {"generation_config.json": generation_config}
    save_model(model, folder, tokenizer=make_tokenizer(), dtype=torch.float32, extra_files=extra)
    return folder


def save_mistral_model(folder: Path, vocabulary: Path, name: str) -> Path:
    """Save a fp32 model as Mistral publishes one, with a copy of `vocabulary` under `name`."""
    config = make_config(vocab_size=32768, dim=32, n_heads=2, n_kv_heads=1, hidden_dim=32)
    parameters = ParametersInMemory(make_model(config).state_dict())
    write_mistral(parameters, config, folder, dtype=torch.float32)
    shutil.copy(vocabulary, folder / name)
    return folder
