"""Mistral (arXiv:2310.06825) and Mixtral (arXiv:2401.04088): one decoder, trained and run.

The forward pass takes tokens of any number of sequences, one after another, with their positions
and a state per layer; it returns the final hidden states and what each router decided.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tramontane.config import ModelConfig
from tramontane.nn.attention import Attention, AttentionState, PackedSequences
from tramontane.nn.dropout import Dropout
from tramontane.nn.feed_forward import FeedForward
from tramontane.nn.linear import Linear
from tramontane.nn.moe import build_moe_layer
from tramontane.nn.norm import RMSNorm
from tramontane.nn.rope import RopeAngles, compute_rope
from tramontane.nn.router import Routing


class ForwardOutput(NamedTuple):
    """Final hidden states (T, D), normalised, and the routing of each layer (empty if dense)."""

    hidden: Tensor
    routing: tuple[Routing, ...]


class DecoderLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + feed_forward(norm(h))."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = (
            FeedForward(config)
            if config.moe is None
            else build_moe_layer(config, config.moe, layer=layer)
        )
        self.attention_dropout, self.ffn_dropout = Dropout(layer, 1), Dropout(layer, 2)

    def forward(
        self, x: Tensor, rope: RopeAngles, state: AttentionState, counts: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """x (T, D) -> (y (T, D), Routing or None); counts (T,) as in `nn.moe.MoeLayer`."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), rope, state))
        h = self.ffn_norm(x)
        y, routing = self.feed_forward(h) if counts is None else self.feed_forward(h, counts)
        return x + self.ffn_dropout(y), routing


class Transformer(nn.Module):
    """A Mistral or Mixtral decoder, as `config` says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        embeddings = nn.init.uniform_(torch.empty(config.vocab_size, config.dim), -1.0, 1.0)
        self.tok_embeddings = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.embedding_dropout = Dropout(0, 0)
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer=layer) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        states: Sequence[AttentionState],
        *,
        experts_per_token: Tensor | None = None,
    ) -> ForwardOutput:
        """tokens and positions (T,) int64, one state per layer -> ForwardOutput.

        A sparse model uses `experts_per_token` (T,) int64 experts, 1 .. E, instead of its own
        number; K of the routing is the largest of them. In a layer of one expert K is 1.
        """
        assert len(states) == len(self.layers), (len(states), len(self.layers))
        config = self.config
        assert experts_per_token is None or config.moe is not None, "a dense model has no experts"
        rope = compute_rope(positions, head_dim=config.head_dim, theta=config.rope_theta)
        x = self.embedding_dropout(self.tok_embeddings(tokens))  # (T, D)
        decisions = []
        for layer, state in zip(self.layers, states, strict=True):
            x, routing = layer(x, rope, state, experts_per_token)
            if routing is not None:
                decisions.append(routing)
        return ForwardOutput(self.norm(x), tuple(decisions))

    def forward_packed(self, tokens: Tensor, seqlens: Sequence[int]) -> ForwardOutput:
        """Run whole sequences without a cache: tokens (T,) with T = sum(seqlens)."""
        assert sum(seqlens) == len(tokens), (sum(seqlens), len(tokens))
        positions = torch.cat([torch.arange(n, device=tokens.device) for n in seqlens])
        return self(tokens, positions, [PackedSequences(seqlens)] * len(self.layers))

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, (..., D) -> (..., V), in fp32."""
        return self.output(hidden).float()


def build_model(config: ModelConfig, *, device: torch.device | str = "cpu") -> Transformer:
    """A model whose weights are random; on device "meta" it has shapes alone."""
    with torch.device(device):
        return Transformer(config)
