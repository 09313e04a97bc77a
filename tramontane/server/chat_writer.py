"""The answer to a conversation in OpenAI's shape, whole or in chunks."""

from collections.abc import Sequence
from typing import Any

from tramontane.engine.completion import TextPiece
from tramontane.server.chunks import Chunks
from tramontane.server.exchange import Exchange, build_timings
from tramontane.server.generation import Answer
from tramontane.server.logprobs import describe_chat_logprobs, describe_prompt_logprobs
from tramontane.server.routing_json import describe_pieces


def build_chat_answer(exchange: Exchange, answers: Sequence[Answer]) -> dict[str, Any]:
    """The body of the answer."""
    completions = [answer.completion for answer in answers]
    body = {
        **exchange.build_head("chat.completion", "chatcmpl"),
        "choices": [_build_choice(exchange, i, answer) for i, answer in enumerate(answers)],
        "usage": exchange.build_usage(completions),
        "safety": exchange.build_safety(),
        "timings": build_timings(completions[0]),
    }
    if (logprobs := completions[0].prompt_logprobs) is not None:
        body["prompt_logprobs"] = describe_prompt_logprobs(logprobs, exchange.names)
    if exchange.fields.return_token_ids:
        body["prompt_token_ids"] = exchange.prompts[0].ids
    return body


def _build_choice(exchange: Exchange, index: int, answer: Answer) -> dict[str, Any]:
    completion = answer.completion
    choice = {
        "index": index,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": None,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        **exchange.build_extras(completion, exchange.prompts[0]),
    }
    if completion.logprobs is not None:
        content = describe_chat_logprobs(completion.logprobs, exchange.names)
        choice["logprobs"] = {"content": content, "refusal": None}
    if exchange.fields.return_token_ids:
        choice["token_ids"] = list(completion.token_ids)
    if exchange.wants_routing:
        choice["routing"] = describe_pieces(answer.pieces)
    return choice


class ChatChunks(Chunks):
    """The answer as `chat.completion.chunk`s: a role, texts, an end for each choice, the usage."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange, exchange.build_head("chat.completion.chunk", "chatcmpl"))

    def begin(self) -> list[dict[str, Any]]:
        """A chunk with the role for each choice; the first says which safety prefix is in force."""
        chunks = [
            self._wrap(index, {"delta": {"role": "assistant", "content": ""}})
            for index in range(self._exchange.num_answers)
        ]
        chunks[0]["safety"] = self._exchange.build_safety()
        if self._exchange.fields.return_token_ids:
            chunks[0]["prompt_token_ids"] = self._exchange.prompts[0].ids
        return chunks

    def _describe_pieces(self, index: int, text: str, pieces: list[TextPiece]) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": text}
        if self._exchange.wants_routing:
            delta["routing"] = describe_pieces(pieces)
        choice: dict[str, Any] = {"delta": delta}
        if logprobs := [piece.logprob for piece in pieces if piece.logprob is not None]:
            content = describe_chat_logprobs(logprobs, self._exchange.names)
            choice["logprobs"] = {"content": content, "refusal": None}
        return choice

    def _describe_end(self) -> dict[str, Any]:
        return {"delta": {}}
