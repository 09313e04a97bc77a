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

    @property
    def name(self) -> str: ...
    @property
    def created(self) -> int: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def num_experts(self) -> int | None: ...
    @property
    def num_experts_per_tok(self) -> int | None: ...
    @property
    def layer_experts(self) -> Sequence[int]: ...  # of each layer; empty if dense
    @property
    def num_parameters(self) -> int: ...
    @property
    def num_active_parameters(self) -> int: ...
    @property
    def num_expert_parameters(self) -> int: ...  # of one expert
    @property
    def weight_bytes_per_expert(self) -> int: ...


class EngineStats(Protocol):
    """Counts since the start, but for what runs and waits now. Prefix cache: tokens."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def kv_cache_usage(self) -> float: ...  # 0..1
    @property
    def prefix_cache_queries(self) -> int: ...
    @property
    def prefix_cache_hits(self) -> int: ...
    @property
    def num_preemptions(self) -> int: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_generation_tokens(self) -> int: ...
    @property
    def pass_sizes(self) -> Mapping[int, int]: ...  # how many passes had so many tokens
    @property
    def expert_tokens(self) -> Sequence[Sequence[int]]: ...  # (L, E)


class AnswerStream(Protocol):
    """The answers to one request; each choice's last update has its completion."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> list[ChoiceUpdate]: ...

    def cancel(self) -> None:
        """The caller has left: the choices end with "abort"."""


class ServingEngine(Protocol):
    """Answers requests in a thread of its own.

    `generation_overrides` are those of `default_params` that the model's generation_config.json
    set. `chat_format` is None for a base model. `cache_config` describes the cache of keys and
    values in vLLM's words.
    """

    @property
    def model(self) -> ServedModel: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def chat_format(self) -> ChatFormat | None: ...
    @property
    def default_params(self) -> SamplingParams: ...
    @property
    def generation_overrides(self) -> Mapping[str, Any]: ...
    @property
    def cache_config(self) -> Mapping[str, Any]: ...

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
