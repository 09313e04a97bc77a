"""Bits per byte on held-out text: comparable between tokenizers, lower is better."""

import math
from collections.abc import Mapping

import torch

from tramontane.data.packing import iterate_held_out
from tramontane.data.token_files import TokenFile
from tramontane.models.transformer import Transformer
from tramontane.train.losses import compute_next_token_loss


@torch.no_grad()
def measure_bits_per_byte(
    model: Transformer, files: Mapping[str, TokenFile], *, seq_len: int, max_tokens: int
) -> dict[str, float]:
    """Score whole documents of each domain, about `max_tokens` tokens, each in pieces of `seq_len`.

    The end of a document counts as a token; a piece is predicted without the pieces before it.
    """
    return {
        domain: _measure_file(model, file, seq_len=seq_len, max_tokens=max_tokens)
        for domain, file in files.items()
    }


def _measure_file(model: Transformer, file: TokenFile, *, seq_len: int, max_tokens: int) -> float:
    nats, num_bytes = 0.0, 0
    for held_out in iterate_held_out(file, seq_len=seq_len, max_tokens=max_tokens):
        nats += compute_next_token_loss(model, held_out.batch).objective.item()
        num_bytes += held_out.num_bytes
    return nats / math.log(2) / num_bytes
