"""How much an engine runs at once, and what it has done."""

from collections.abc import Mapping
from dataclasses import dataclass

from tramontane.errors import ConfigError

MAX_DRAFTS = 32


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """How much runs at once. Raises ConfigError, naming the value, on what cannot be.

    A pass takes at most `max_num_batched_tokens` of at most `max_num_seqs` sequences. At most
    `max_waiting` more may wait (None: any number). The cache has room for all sequences at full
    length, or as many tokens as `kv_cache_memory_bytes` hold; memory is occupied as it is used.
    `use_prefix_cache` keeps the blocks of prompts for others that begin alike. Where a text repeats
    itself, up to `max_num_drafts` tokens are guessed and run along (0: never). Up to
    `max_num_steps` passes that need nothing but a token of each sequence's plain scores follow one
    another in one call (`engine/steps.py`); 1: never more than one.
    """

    max_num_seqs: int = 128
    max_num_batched_tokens: int = 512
    max_waiting: int | None = None
    kv_cache_memory_bytes: int = 4 * 2**30
    use_prefix_cache: bool = True
    max_num_drafts: int = 0
    max_num_steps: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs is {self.max_num_seqs} and max_num_batched_tokens is "
                f"{self.max_num_batched_tokens}; both must be at least 1, and the first no larger"
            )
        if self.max_waiting is not None and self.max_waiting < 1:
            raise ConfigError(f"max_waiting is {self.max_waiting}; it must be at least 1, or none")
        if self.kv_cache_memory_bytes < 1:
            raise ConfigError(
                f"kv_cache_memory_bytes is {self.kv_cache_memory_bytes}; it must be at least 1"
            )
        if not 0 <= self.max_num_drafts <= MAX_DRAFTS:
            raise ConfigError(
                f"max_num_drafts is {self.max_num_drafts}; it must be from 0 to {MAX_DRAFTS}"
            )
        if self.max_num_steps < 1:
            raise ConfigError(f"max_num_steps is {self.max_num_steps}; it must be at least 1")


@dataclass(frozen=True)
class EngineStats:
    """How it stands now, and counts since the start.

    `kv_cache_usage` is the held share of all blocks, 0 to 1. `prefix_cache_queries` and
    `prefix_cache_hits` count tokens of prompts: asked for, and found. `pass_sizes` says how many
    passes had so many tokens. `expert_tokens` (L, E) says how often each expert was chosen; empty
    for a dense model.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generation_tokens: int
    num_passes: int
    pass_sizes: Mapping[int, int]
    num_drafts: int
    num_accepted_drafts: int
    expert_tokens: list[list[int]]
