"""The Python interface: load a model folder, then `generate`, `chat` or `stream`.

llm = LLM()
print(llm.generate("Once upon a time", SamplingParams(max_tokens=100)).text)
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tramontane.checkpoint.intake import Checkpoint, open_checkpoint
from tramontane.config import ModelConfig
from tramontane.engine.bundled import find_bundled_model
from tramontane.engine.completion import Completion, TextPiece
from tramontane.engine.engine import Engine
from tramontane.engine.generation_config import (
    FILE_NAME,
    GenerationConfig,
    load_generation_config,
)
from tramontane.engine.limits import EngineLimits
from tramontane.engine.loading import load_for_running
from tramontane.engine.request import Request, RoutingWanted
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.sequence import Sequence
from tramontane.engine.sequence_builder import SequenceBuilder
from tramontane.engine.vocabulary import (
    find_chat_format,
    find_eos_ids,
    find_side_file,
    require_chat_format,
    require_room,
    require_tokenizer,
)
from tramontane.errors import ConfigError, EngineError, RequestError, TokenizerError
from tramontane.models.transformer import Transformer
from tramontane.quant.formats import QuantRecipe
from tramontane.tokenizer.chat import ChatFormat, Message
from tramontane.tokenizer.tokenizer import Tokenizer


class TextStream:
    """The pieces of one answer as they come. Stop early with `close`; then see `completion`."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine, self._sequence = engine, sequence
        engine.add(sequence)

    def __iter__(self) -> Iterator[TextPiece]:
        return self.iterate()

    def iterate(self, *, with_experts: bool = False) -> Iterator[TextPiece]:
        """The pieces; with experts each comes one token later (`stream(collect_routing=True)`).

        Raises the error that ended the answer, if one did.
        """
        try:
            while not self._sequence.is_finished:
                self._engine.step()
                yield from self._sequence.take_pieces(with_experts=with_experts)
            yield from self._sequence.take_pieces(with_experts=with_experts)
        finally:
            self.close()
        if self._sequence.error is not None:
            raise self._sequence.error

    def close(self) -> None:
        """End the answer where it is and free its cache."""
        self._engine.abort(self._sequence)

    @property
    def completion(self) -> Completion:
        """The answer so far."""
        return self._sequence.build_completion()


class LLM:
    """A model, its tokenizer and an engine. Without `model`, the bundled one.

    `model` is a folder or file in any layout; `dtype` is that of the weights as stored unless
    given. `quant`, such as "int4", rounds them on load; `keep_packed=False` unpacks those of a GGUF
    (`engine/loading.py`). `use_chat` refuses a model without a chat format before its weights are
    read. `max_model_len` lowers the context below the model's own. What else is given are the
    engine's limits (`engine/limits.py`), such as `max_num_seqs`. `origin` says where weights are
    from. Raises CheckpointError, ConfigError or TokenizerError, naming file and remedy.
    """

    _checkpoint: Checkpoint | None = None  # none of a model in memory
    _engine: Engine | None = None  # none once it was taken

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quant: str | QuantRecipe | None = None,
        keep_packed: bool = True,
        use_chat: bool = False,
        max_model_len: int | None = None,
        **limits: Any,
    ) -> None:
        checkpoint = open_checkpoint(find_bundled_model() if model is None else model)
        self.origin = str(checkpoint.contents.path)
        self._checkpoint = checkpoint
        self.tokenizer = require_tokenizer(checkpoint)
        if use_chat:
            _ = self.chat_format
        self.model = load_for_running(
            checkpoint, dtype=dtype, device=device, quant=quant, keep_packed=keep_packed
        )
        self.generation_config = load_generation_config(
            find_side_file(checkpoint, FILE_NAME),
            eos_ids=frozenset(find_eos_ids(checkpoint, self.tokenizer.eos_id)),
        )
        self._build_engine(EngineLimits(**limits), max_model_len)

    @classmethod
    def from_parts(cls, model: Transformer, tokenizer: Tokenizer) -> Self:
        """Around a model in memory, one in training for example. Raises CheckpointError.

        The model is put into evaluation mode: some routers draw random numbers in training.
        """
        llm = cls.__new__(cls)  # not __init__, which reads files
        llm.origin, llm.model, llm.tokenizer = "a model in memory", model.eval(), tokenizer
        eos_ids = frozenset({tokenizer.eos_id})
        llm.generation_config = GenerationConfig(SamplingParams(), {}, eos_ids)
        llm._build_engine(EngineLimits(max_num_seqs=16), None)
        return llm

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    def list_kernel_seconds(self) -> dict[str, float]:
        """Seconds so far in each part of the model; empty unless it runs as one native call."""
        return self.engine.list_kernel_seconds()

    @property
    def engine(self) -> Engine:
        """What runs the model. Raises EngineError once it was taken."""
        if self._engine is None:
            raise EngineError(
                f"the engine of {self.origin} was handed to an AsyncEngine, whose thread alone may "
                "run it: ask that one, or load the model into another LLM"
            )
        return self._engine

    def take_engine(self) -> Engine:
        """Hand the engine over to another thread; from then on nothing can be asked here.

        Raises EngineError if it was taken before, or answers are unfinished.
        """
        engine = self.engine
        if engine.num_unfinished:
            raise EngineError(
                f"{engine.num_unfinished} answers of {self.origin} are unfinished: read their "
                "streams to the end, or close them, before another takes its engine"
            )
        self._engine = None
        return engine

    @property
    def default_params(self) -> SamplingParams:
        """Our defaults, overridden by the folder's generation_config.json."""
        return self.generation_config.params

    @cached_property
    def chat_format(self) -> ChatFormat:
        """How the model reads a conversation. Raises TokenizerError if it brings no such format."""
        if self._checkpoint is None:
            raise TokenizerError(f"{self.origin} has no chat format")
        return require_chat_format(self._checkpoint, self.tokenizer)

    def find_chat_format(self) -> ChatFormat | None:
        """`chat_format`, or None for a base model. Raises TokenizerError if it is unusable."""
        if self._checkpoint is None:
            return None
        return find_chat_format(self._checkpoint, self.tokenizer)

    @overload
    def generate(
        self,
        prompt: str,
        params: SamplingParams | None = ...,
        *,
        collect_routing: bool = ...,
        show_progress: bool | None = ...,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        params: SamplingParams | Items[SamplingParams] | None = ...,
        *,
        collect_routing: bool = ...,
        show_progress: bool | None = ...,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        params: SamplingParams | Items[SamplingParams] | None = None,
        *,
        collect_routing: bool = False,
        show_progress: bool | None = None,
    ) -> Completion | list[Completion]:
        """Answer one prompt, or each of a list; those of a list share the forward passes.

        `params` defaults to `default_params`; a list needs as many as there are prompts. Of n > 1
        answers the others are in `Completion.others`. Several prompts show a progress bar in a
        terminal, unless `show_progress` says otherwise. Raises RequestError or ContextError before
        anything runs, and the first error that ended an answer once all have ended.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        routing: RoutingWanted = "all" if collect_routing else "none"
        requests = [
            self.build_request(text, some, routing=routing)
            for text, some in zip(prompts, self._spread(params, len(prompts)), strict=True)
        ]
        completions = self.run(requests, show_progress=show_progress)
        return completions[0] if isinstance(prompt, str) else completions

    def chat(
        self,
        messages: Items[Message],
        params: SamplingParams | None = None,
        *,
        collect_routing: bool = False,
    ) -> Completion:
        """Answer the last message of a conversation, written in `chat_format`.

        Raises as `stream_chat`.
        """
        routing: RoutingWanted = "all" if collect_routing else "none"
        return self.run([self.build_chat_request(messages, params, routing=routing)])[0]

    def stream(
        self, prompt: str, params: SamplingParams | None = None, *, collect_routing: bool = False
    ) -> TextStream:
        """Answer one prompt piece by piece; several streams may be read in turn."""
        routing: RoutingWanted = "all" if collect_routing else "none"
        return self._stream(self.build_request(prompt, params, routing=routing))

    def stream_chat(
        self,
        messages: Items[Message],
        params: SamplingParams | None = None,
        *,
        collect_routing: bool = False,
    ) -> TextStream:
        """Answer the last message of a conversation, written in `chat_format`, piece by piece.

        Raises RequestError if the messages do not fit the format, ContextError if not the context.
        """
        routing: RoutingWanted = "all" if collect_routing else "none"
        return self._stream(self.build_chat_request(messages, params, routing=routing))

    def build_request(
        self, prompt: str, params: SamplingParams | None = None, *, routing: RoutingWanted = "none"
    ) -> Request:
        """A text to be continued. Raises RequestError if it is empty."""
        if not isinstance(prompt, str) or not prompt:
            raise RequestError(f"the prompt is {prompt!r}; it must be a text that is not empty")
        ids = self.tokenizer.encode(prompt, bos=self.tokenizer.adds_bos)
        return Request(prompt_ids=ids, params=params or self.default_params, routing=routing)

    def build_chat_request(
        self,
        messages: Items[Message],
        params: SamplingParams | None = None,
        *,
        routing: RoutingWanted = "none",
    ) -> Request:
        """A conversation to be answered. Raises RequestError if it does not fit the format."""
        ids = self.chat_format.encode(messages, self.tokenizer)
        params = params or self.default_params
        return Request(prompt_ids=ids, params=params, routing=routing, starts_text=True)

    def run(
        self, requests: Items[Request], *, show_progress: bool | None = None
    ) -> list[Completion]:
        """Answer requests together; see `generate`."""
        groups = [self.sequences.build(request) for request in requests]
        everyone = [sequence for group in groups for sequence in group]
        pending = everyone
        is_shown = len(requests) > 1 if show_progress is None else show_progress
        try:
            for group in groups:
                self.engine.add(group[0])
            with _build_progress(is_shown) as progress:
                bar = progress.add_task("answers", total=len(everyone))
                while pending:
                    if any(sequence.is_finished for sequence in self.engine.step()):
                        pending = [s for s in pending if not s.is_finished]
                        progress.update(bar, completed=len(everyone) - len(pending))
        finally:
            for sequence in everyone:
                self.engine.abort(sequence)
        if errors := [s.error for s in everyone if s.error is not None]:
            raise errors[0]
        return [_join([s.build_completion() for s in group]) for group in groups]

    def _stream(self, request: Request) -> TextStream:
        if request.params.n != 1:
            raise RequestError(f"n is {request.params.n}; a stream has one answer")
        [sequence] = self.sequences.build(request)
        return TextStream(self.engine, sequence)

    def _spread(
        self, params: SamplingParams | Items[SamplingParams] | None, count: int
    ) -> Items[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params] * count
        if len(params) != count:
            raise RequestError(
                f"there are {count} prompts, but {len(params)} sampling parameters: give one for "
                "all, or one for each"
            )
        return params

    def _build_engine(self, limits: EngineLimits, max_model_len: int | None) -> None:
        require_room(self.tokenizer, self.config, origin=self.origin)
        longest = self.config.max_seq_len
        if max_model_len is not None and not 1 < max_model_len <= longest:
            raise ConfigError(
                f"max_model_len is {max_model_len}; this model has a context of 2 to {longest}"
            )
        self.sequences = SequenceBuilder(
            self.tokenizer,
            self.config,
            eos_ids=self.generation_config.eos_ids,
            max_seq_len=max_model_len,
        )
        self._engine = Engine(self.model, vocab_size=self.tokenizer.vocab_size, limits=limits)


def _join(answers: list[Completion]) -> Completion:
    return replace(answers[0], others=tuple(answers[1:])) if len(answers) > 1 else answers[0]


def _build_progress(is_shown: bool) -> Progress:
    """A bar on standard error, which only a terminal shows."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (is_shown and console.is_terminal),
    )
