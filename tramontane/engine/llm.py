"""The Python interface: load a model folder, then `generate` or `stream`.

llm = LLM()
print(llm.generate("Once upon a time", SamplingParams(max_tokens=100)).text)
"""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from functools import cached_property
from pathlib import Path
from typing import Self, overload

import torch

from tramontane.checkpoint.intake import Checkpoint, open_checkpoint
from tramontane.config import ModelConfig
from tramontane.engine.bundled import find_bundled_model
from tramontane.engine.completion import Completion, TextPiece
from tramontane.engine.constraints import ConstraintCompiler
from tramontane.engine.engine import MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, Engine
from tramontane.engine.generation_config import (
    FILE_NAME,
    GenerationConfig,
    load_generation_config,
)
from tramontane.engine.loading import load_for_running
from tramontane.engine.sampling_params import SamplingParams
from tramontane.engine.sequence import Sequence
from tramontane.engine.text_output import TextOutput
from tramontane.engine.vocabulary import (
    find_eos_ids,
    find_side_file,
    require_chat_format,
    require_room,
    require_tokenizer,
)
from tramontane.errors import RequestError, TokenizerError
from tramontane.models.transformer import Transformer
from tramontane.quant.formats import QuantRecipe
from tramontane.tokenizer.chat import ChatFormat, Message
from tramontane.tokenizer.stream import IncrementalDecoder
from tramontane.tokenizer.tokenizer import Tokenizer


class TextStream:
    """The pieces of one answer as they come. Stop early with `close`; then see `completion`."""

    def __init__(self, engine: Engine, sequence: Sequence) -> None:
        self._engine, self._sequence = engine, sequence
        engine.add(sequence)

    def __iter__(self) -> Iterator[TextPiece]:
        return self.iterate()

    def iterate(self, *, with_experts: bool = False) -> Iterator[TextPiece]:
        """The pieces; with experts each comes one token later (`stream(collect_routing=True)`)."""
        try:
            while not self._sequence.is_finished:
                self._engine.step()
                yield from self._sequence.take_pieces(with_experts=with_experts)
            yield from self._sequence.take_pieces(with_experts=with_experts)
        finally:
            self.close()

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
    read. `origin` says where they are from. Raises CheckpointError, ConfigError or TokenizerError,
    naming file and remedy.
    """

    _checkpoint: Checkpoint | None = None  # none of a model in memory

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quant: str | QuantRecipe | None = None,
        keep_packed: bool = True,
        use_chat: bool = False,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        max_num_seqs: int = MAX_NUM_SEQS,
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
        self._engine = self._build_engine(
            max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs
        )

    @classmethod
    def from_parts(cls, model: Transformer, tokenizer: Tokenizer) -> Self:
        """Around a model in memory, one in training for example. Raises CheckpointError."""
        llm = cls.__new__(cls)  # not __init__, which reads files
        llm.origin, llm.model, llm.tokenizer = "a model in memory", model, tokenizer
        eos_ids = frozenset({tokenizer.eos_id})
        llm.generation_config = GenerationConfig(SamplingParams(), {}, eos_ids)
        llm._engine = llm._build_engine()
        return llm

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    def list_kernel_seconds(self) -> dict[str, float]:
        """Seconds so far in each part of the model; empty unless it runs as one native call."""
        return self._engine.list_kernel_seconds()

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

    @overload
    def generate(
        self, prompt: str, params: SamplingParams | None = ..., *, collect_routing: bool = ...
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str],
        params: SamplingParams | None = ...,
        *,
        collect_routing: bool = ...,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: str | list[str],
        params: SamplingParams | None = None,
        *,
        collect_routing: bool = False,
    ) -> Completion | list[Completion]:
        """Answer one prompt, or each of a list; those of a list share the forward passes.

        `params` defaults to `default_params`. Raises RequestError or ContextError before anything
        runs.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        sequences = [
            self._build_sequence(text, params, collect_routing=collect_routing) for text in prompts
        ]
        self._run(sequences)
        completions = [sequence.build_completion() for sequence in sequences]
        return completions[0] if isinstance(prompt, str) else completions

    def stream(
        self, prompt: str, params: SamplingParams | None = None, *, collect_routing: bool = False
    ) -> TextStream:
        """Answer one prompt piece by piece; several streams may be read in turn."""
        sequence = self._build_sequence(prompt, params, collect_routing=collect_routing)
        return TextStream(self._engine, sequence)

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
        ids = self.chat_format.encode(messages, self.tokenizer)
        decoder = IncrementalDecoder(self.tokenizer, starts_text=True)
        sequence = self._start(ids, decoder, params, collect_routing=collect_routing)
        return TextStream(self._engine, sequence)

    def _run(self, sequences: Items[Sequence]) -> None:
        try:
            for sequence in sequences:
                self._engine.add(sequence)
            while not all(sequence.is_finished for sequence in sequences):
                self._engine.step()
        finally:
            for sequence in sequences:
                self._engine.abort(sequence)

    def _build_sequence(
        self, prompt: str, params: SamplingParams | None, *, collect_routing: bool
    ) -> Sequence:
        if not isinstance(prompt, str) or not prompt:
            raise RequestError(f"the prompt is {prompt!r}; it must be a text that is not empty")
        ids = self.tokenizer.encode(prompt, bos=self.tokenizer.adds_bos)
        decoder = IncrementalDecoder(self.tokenizer)
        return self._start(ids, decoder, params, collect_routing=collect_routing)

    def _start(
        self,
        ids: list[int],
        decoder: IncrementalDecoder,
        params: SamplingParams | None,
        *,
        collect_routing: bool,
    ) -> Sequence:
        params = params or self.default_params
        return Sequence(
            ids,
            params,
            text_output=TextOutput(decoder, stop=params.stop),
            eos_ids=self.generation_config.eos_ids,
            max_seq_len=self.config.max_seq_len,
            collect_routing=collect_routing,
            matcher=self._constraints.compile(params.constraint) if params.constraint else None,
        )

    def _build_engine(self, **limits: int) -> Engine:
        require_room(self.tokenizer, self.config, origin=self.origin)
        self._constraints = ConstraintCompiler(
            self.tokenizer, self.generation_config.eos_ids, self.tokenizer.vocab_size
        )
        return Engine(self.model, vocab_size=self.tokenizer.vocab_size, **limits)
