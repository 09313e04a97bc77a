"""How much memory training needs, from the configuration alone: before anything is built."""

from dataclasses import dataclass
from typing import Literal

from tramontane.config import ModelConfig
from tramontane.errors import CapacityError
from tramontane.kernels.fused.attention import QUERY_BLOCK
from tramontane.kernels.fused.cross_entropy import HEAD_BLOCK

_PADDING = 1.06  # rows of experts are padded by up to an eighth
_RUNTIME = 2**27  # by which torch and its libraries grow once they work, as measured
_MARGIN = 1.1  # the estimate was good to a tenth where it was measured


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of each part. `activations` is the most that a batch can keep: rows of one document."""

    weights: int  # in the dtype of the computation
    optimizer: int  # fp32 weights and moments
    gradients: int
    activations: int
    runtime: int = _RUNTIME

    @property
    def fixed(self) -> int:
        """What no smaller batch saves."""
        return self.weights + self.optimizer + self.gradients

    @property
    def total(self) -> int:
        """All parts together."""
        return self.fixed + self.activations + self.runtime


def estimate_training_memory(
    config: ModelConfig,
    *,
    rows: int,
    seq_len: int,
    bytes_per_value: int,
    optimizer: Literal["adamw", "muon"],
) -> TrainingMemory:
    """Memory by which a process grows that trains with batches of `rows` of `seq_len` tokens.

    `bytes_per_value` is that of the computation, 2 for bf16.
    """
    count = config.count_parameters().total
    moments = 2 * count - (_count_muon(config) if optimizer == "muon" else 0)
    # In bf16 a batch's gradients exist beside their fp32 sums; in fp32 they become the sums.
    gradients = count * (4 if bytes_per_value == 4 else 4 + bytes_per_value)
    return TrainingMemory(
        weights=count * bytes_per_value,
        optimizer=4 * (count + moments),
        gradients=gradients,
        activations=_count_activations(
            config, rows * seq_len, seq_len=seq_len, bytes_per_value=bytes_per_value
        ),
    )


def require_memory(need: TrainingMemory, free: int | None) -> str:
    """A sentence on what is needed and free (bytes), with the remedy if it may not suffice.

    Raises CapacityError if not even an empty batch would fit.
    """
    parts = ", ".join(f"{name} {_show(value)}" for name, value in vars(need).items())
    text = f"memory: about {_show(need.total)} ({parts})"
    if free is None:
        return text
    text += f"; {_show(free)} free"
    if need.fixed > free:
        raise CapacityError(
            f"{text}: weights, optimizer and gradients alone do not fit; train a smaller model, "
            "or use a larger machine"
        )
    if need.total * _MARGIN > free:
        text += (
            ": the run may be killed; lower batch_size or seq_len (and raise accumulation), or go "
            "on with --resume if it is"
        )
    return text


def _show(num_bytes: int) -> str:
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.2f} GiB"


def _count_muon(config: ModelConfig) -> int:
    """Parameters that have one moment instead of two: the matrices of attention and experts."""
    num_experts = config.moe.count_experts(config.n_layers) if config.moe else 0
    outside = config.vocab_size * config.dim * (1 if config.tie_embeddings else 2)
    outside += config.dim * (2 * config.n_layers + 1) + config.dim * num_experts
    return config.count_parameters().total - outside


def _count_activations(
    config: ModelConfig, num_tokens: int, *, seq_len: int, bytes_per_value: int
) -> int:
    """What autograd keeps of a batch until the backward pass, and the largest buffers in it."""
    heads = config.n_heads + config.n_kv_heads
    # Two norms, queries, keys, values, what attention read, and its probabilities: blocks of
    # queries, of several short rows too, with all keys that any of them sees.
    seen = max(0, min(seq_len, config.sliding_window or seq_len) - QUERY_BLOCK)
    keys = min(num_tokens, QUERY_BLOCK + seen / 2)
    layer = 4 * config.dim + 2 * heads * config.head_dim + config.n_heads * keys
    layer += _count_feed_forward(config)
    router = 40 * config.moe.num_experts + 40 * config.moe.num_experts_per_tok if config.moe else 0
    kept = num_tokens * (config.n_layers * (layer * bytes_per_value + router + 8))
    head = config.vocab_size * (4 * config.dim + 3 * bytes_per_value * min(HEAD_BLOCK, num_tokens))
    ends = num_tokens * 4 * config.dim * bytes_per_value + head
    backward = 2 * num_tokens * _count_feed_forward(config) * bytes_per_value
    return round(kept + ends + backward)


def _count_feed_forward(config: ModelConfig) -> float:
    """Values that one layer's feed-forward network keeps per token."""
    if config.moe is None:
        return 4 * config.hidden_dim
    copies = config.moe.num_experts_per_tok * _PADDING
    return copies * (2 * config.dim + 2 * config.hidden_dim)
