"""How much memory a model needs, from its configuration alone: before any download or load.

weights + keys and values of all tokens + what one forward pass holds at a time.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from tramontane.checkpoint.ours import count_fixed_bytes
from tramontane.checkpoint.quantized import list_parameters
from tramontane.config import ModelConfig
from tramontane.engine.loading import parse_recipe
from tramontane.errors import RequestError
from tramontane.quant.formats import choose_formats

Quant = Literal["none", "int8", "int4"]

PREFILL_TOKENS = 512  # of one forward pass


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part."""

    weights: int
    kv_cache: int
    scratch: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.kv_cache + self.scratch


def estimate_memory(
    config: ModelConfig,
    *,
    quant: Quant = "none",
    bytes_per_value: int = 2,
    context: int | None = None,
    batch: int = 1,
) -> MemoryEstimate:
    """Memory to run `config` with `batch` sequences of `context` tokens (None: its longest).

    `bytes_per_value` is that of weights and cache, 2 for bf16. `quant` packs the matrices of
    attention and experts in groups of 32; router, norms, embeddings and head stay as they are.
    Raises RequestError on a context beyond the model's, ConfigError on rows that do not fit groups.
    """
    context = config.max_seq_len if context is None else context
    if not 0 < context <= config.max_seq_len:
        raise RequestError(
            f"the context is {context:,} tokens; the model has 1 to {config.max_seq_len:,}"
        )
    if batch < 1:
        raise RequestError(f"the batch is {batch}; it must be at least 1 sequence")
    kept = min(context, config.sliding_window or context)
    return MemoryEstimate(
        weights=count_weight_bytes(config, quant=quant, bytes_per_value=bytes_per_value),
        kv_cache=batch * kept * config.count_kv_bytes_per_token(bytes_per_value=bytes_per_value),
        scratch=_count_scratch_bytes(
            config, context=context, batch=batch, bytes_per_value=bytes_per_value
        ),
    )


def find_longest_context(
    config: ModelConfig,
    *,
    quant: Quant = "none",
    bytes_per_value: int = 2,
    batch: int = 1,
    available: int,
) -> int:
    """The most tokens per sequence that fit into `available` bytes; 0 if none do."""

    def fits(context: int) -> bool:
        parts = estimate_memory(
            config, quant=quant, bytes_per_value=bytes_per_value, context=context, batch=batch
        )
        return parts.total <= available

    low, high = 0, config.max_seq_len  # low fits, or is 0; what lies above high does not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def count_weight_bytes(config: ModelConfig, *, quant: Quant, bytes_per_value: int = 2) -> int:
    """Bytes of all weights: to the byte what a loaded model holds."""
    total = config.count_parameters().total
    fixed = count_fixed_bytes(config)
    if quant == "none":
        return total * bytes_per_value + fixed
    shapes = list_parameters(config)
    formats = choose_formats(shapes, parse_recipe(quant))
    packed = sum(format.count_bytes(shapes[name]) for name, format in formats.items())
    return (total - sum(prod(shapes[name]) for name in formats)) * bytes_per_value + packed + fixed


def _count_scratch_bytes(
    config: ModelConfig, *, context: int, batch: int, bytes_per_value: int
) -> int:
    """What one layer and the head hold at a time, for a chunk of a prompt or a decode step."""
    tokens = max(batch, min(context, PREFILL_TOKENS))
    copies = config.moe.num_experts_per_tok + config.moe.residual if config.moe else 1
    heads = config.n_heads + 2 * config.n_kv_heads
    per_token = 4 * config.dim + heads * config.head_dim
    per_token += copies * (2 * config.dim + 3 * config.hidden_dim)
    scores = config.n_heads * min(tokens, 256) * context * 4
    return tokens * per_token * bytes_per_value + scores + 2 * batch * config.vocab_size * 4
