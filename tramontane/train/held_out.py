"""Held-out text: bits per byte (comparable between tokenizers, lower is better), router load."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tramontane.data.packing import iterate_held_out
from tramontane.data.token_files import TokenFile
from tramontane.models.transformer import Transformer
from tramontane.train.losses import compute_next_token_loss
from tramontane.train.router_health import LayerLoad, RouterHealth


@dataclass(frozen=True)
class HeldOutScore:
    """What a model makes of one domain. The end of a document counts as a token without bytes."""

    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    layers: tuple[LayerLoad, ...]


def measure_held_out(
    model: Transformer, files: Mapping[str, TokenFile], *, seq_len: int, max_tokens: int
) -> dict[str, HeldOutScore]:
    """Score whole documents of each domain, about `max_tokens` tokens, in pieces of `seq_len`.

    A piece is predicted without the pieces before it.
    """
    return {
        domain: _measure_file(model, file, seq_len=seq_len, max_tokens=max_tokens)
        for domain, file in files.items()
    }


@torch.no_grad()
def _measure_file(
    model: Transformer, file: TokenFile, *, seq_len: int, max_tokens: int
) -> HeldOutScore:
    nats, num_tokens, num_bytes = 0.0, 0, 0
    health = RouterHealth()
    for held_out in iterate_held_out(file, seq_len=seq_len, max_tokens=max_tokens):
        terms = compute_next_token_loss(model, held_out.batch)
        nats += terms.objective.item()
        num_tokens += terms.num_units
        num_bytes += held_out.num_bytes
        health.add(terms.routing)
    bits = nats / math.log(2) / num_bytes
    return HeldOutScore(bits, num_tokens, num_bytes, tuple(health.layers()))
