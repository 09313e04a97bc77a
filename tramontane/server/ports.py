"""What the server needs of an engine: the one seam between HTTP and the model.

Everything here is called in the event loop's thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

from tramontane.engine.completion import ChoiceUpdate
from tramontane.engine.request import Request
from tramontane.engine.sampling_params import SamplingParams
from tramontane.tokenizer.chat import ChatFormat
from tramontane.tokenizer.tokenizer import Tokenizer


class ServedModel(Protocol):
    """Facts about the model. `created` is in Unix seconds; experts are None in a dense one."""

    name: str
    created: int
    max_seq_len: int
    vocab_size: int
    n_layers: int
    dim: int
    num_experts: int | None
    num_experts_per_tok: int | None
    num_parameters: int
    num_active_parameters: int
    num_expert_parameters: int  # of one expert
    weight_bytes_per_expert: int


class EngineStats(Protocol):
    """Counts since the start, but for what runs and waits now. Prefix cache: tokens."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float  # 0..1
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generation_tokens: int
    expert_tokens: Sequence[Sequence[int]]  # (L, E)


class AnswerStream(Protocol):
    """The answers to one request; each choice's last update has its completion."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> list[ChoiceUpdate]: ...

    def cancel(self) -> None:
        """The caller has left: the choices end with "abort"."""


class ServingEngine(Protocol):
    """Answers requests in a thread of its own.

    `generation_overrides` are those of `default_params` that the model's generation_config.json
    set. `chat_format` is None for a base model.
    """

    model: ServedModel
    tokenizer: Tokenizer
    chat_format: ChatFormat | None
    default_params: SamplingParams
    generation_overrides: Mapping[str, Any]

    def submit(self, request: Request) -> AnswerStream:
        """Queue a request. Raises RequestError, ContextError, OverloadError, CapacityError (it
        never fits) or UnavailableError at once.
        """
        ...

    def get_stats(self) -> EngineStats:
        """Cheap: a dashboard asks every few seconds."""
        ...

    def is_healthy(self) -> bool:
        """Whether the engine's thread lives and moves."""
        ...

    def start(self) -> None:
        """Once, in the event loop's thread."""

    async def drain(self, seconds: float) -> None:
        """Take no more requests, wait for those that run, then end the rest."""

    def stop(self) -> None:
        """Free what it holds; nothing runs any more."""
