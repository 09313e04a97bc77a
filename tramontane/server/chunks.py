"""What the chunks of both interfaces have in common; chat_writer.py and completion_writer.py."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from tramontane.engine.completion import Completion, TextPiece
from tramontane.server.exchange import Exchange, build_timings
from tramontane.server.generation import Update


class Chunks(ABC):
    """A ChunkWriter (streaming.py). `head` is what all chunks begin with."""

    def __init__(self, exchange: Exchange, head: dict[str, Any]) -> None:
        self._exchange, self._head = exchange, head
        options = exchange.fields.stream_options
        self._has_usage = options is not None and bool(options.include_usage)
        self._shows_silent = exchange.wants_routing or bool(exchange.fields.return_token_ids)
        self._completions: dict[int, Completion] = {}

    @abstractmethod
    def begin(self) -> list[dict[str, Any]]:
        """Before any news."""

    @abstractmethod
    def _describe_pieces(self, index: int, text: str, pieces: list[TextPiece]) -> dict[str, Any]:
        """The choice's fields for new pieces, whose text is `text`."""

    @abstractmethod
    def _describe_end(self) -> dict[str, Any]:
        """The choice's fields where nothing is new but the end."""

    def write(self, updates: Iterable[Update]) -> list[dict[str, Any]]:
        """A chunk for each answer's new pieces, and one for its end."""
        chunks = []
        for index, pieces, completion in updates:
            if pieces and (chunk := self._write_pieces(index, pieces)):
                chunks.append(chunk)
            if completion is not None:
                chunks.append(self._write_end(index, completion))
        return chunks

    def finish(self) -> list[dict[str, Any]]:
        """The usage, if it was asked for."""
        if not self._has_usage:
            return []
        completions = [self._completions[index] for index in sorted(self._completions)]
        usage, timings = self._exchange.build_usage(completions), build_timings(completions[0])
        return [{**self._head, "choices": [], "usage": usage, "timings": timings}]

    def _write_pieces(self, index: int, pieces: list[TextPiece]) -> dict[str, Any] | None:
        """None for tokens that completed no character, if nothing else is told of them."""
        text = "".join([piece.text for piece in pieces])
        described = self._describe_pieces(index, text, pieces)
        if not (text or self._shows_silent or "logprobs" in described):
            return None
        if self._exchange.fields.return_token_ids:
            described["token_ids"] = [piece.token_id for piece in pieces]
        return self._wrap(index, described)

    def _write_end(self, index: int, completion: Completion) -> dict[str, Any]:
        self._completions[index] = completion
        end = {
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            **self._exchange.build_extras(completion, self._exchange.find_prompt(index)),
        }
        return self._wrap(index, {**self._describe_end(), **end})

    def _wrap(self, index: int, fields: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": None, **fields}
        chunk = {**self._head, "choices": [choice]}
        if self._has_usage:
            chunk["usage"] = None
        return chunk
