"""The answers to prompts in OpenAI's first shape, whole or in chunks."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tramontane.engine.completion import Completion, TextPiece, TokenLogprob
from tramontane.server.chunks import Chunks
from tramontane.server.exchange import Exchange, build_timings
from tramontane.server.generation import Answer
from tramontane.server.logprobs import describe_completion_logprobs, describe_prompt_logprobs
from tramontane.server.prompts import Prompt
from tramontane.server.routing_json import describe_pieces
from tramontane.tokenizer.stream import IncrementalDecoder


def build_text_answer(
    exchange: Exchange, answers: Sequence[Answer], *, echo: bool
) -> dict[str, Any]:
    """The body of the answer."""
    completions = [answer.completion for answer in answers]
    return {
        **exchange.build_head("text_completion", "cmpl"),
        "choices": [_build_choice(exchange, i, a, echo=echo) for i, a in enumerate(answers)],
        "usage": exchange.build_usage(completions),
        "safety": exchange.build_safety(),
        "timings": build_timings(completions[0]),
    }


def _build_choice(exchange: Exchange, index: int, answer: Answer, *, echo: bool) -> dict[str, Any]:
    completion, prompt = answer.completion, exchange.find_prompt(index)
    choice = {
        "index": index,
        "text": prompt.text * echo + completion.text,
        "logprobs": _describe_logprobs(exchange, completion, prompt, echo=echo),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        **exchange.build_extras(completion, prompt),
    }
    if completion.prompt_logprobs is not None and exchange.fields.prompt_logprobs is not None:
        choice["prompt_logprobs"] = describe_prompt_logprobs(
            completion.prompt_logprobs, exchange.names
        )
    if exchange.fields.return_token_ids:
        choice["prompt_token_ids"] = prompt.ids
        choice["token_ids"] = list(completion.token_ids)
    if exchange.wants_routing:
        choice["routing"] = describe_pieces(answer.pieces)
    return choice


def _describe_logprobs(
    exchange: Exchange, completion: Completion, prompt: Prompt, *, echo: bool
) -> dict[str, Any] | None:
    """Of prompt and answer under `echo`, as evaluation harnesses read them."""
    if completion.logprobs is None:
        return None
    entries: list[TokenLogprob | None] = list(completion.logprobs)
    ids = list(completion.token_ids)
    if echo and completion.prompt_logprobs is not None:
        entries = [*completion.prompt_logprobs, *entries]
        ids = [*prompt.ids, *ids]
    decoder = IncrementalDecoder(exchange.engine.tokenizer, starts_text=echo)
    lengths = [len(decoder.push(token_id)) for token_id in ids]
    return dict(describe_completion_logprobs(entries, ids, exchange.names, lengths=lengths))


class CompletionChunks(Chunks):
    """The answers as `text_completion` chunks."""

    def __init__(self, exchange: Exchange, *, echo: bool) -> None:
        super().__init__(exchange, exchange.build_head("text_completion", "cmpl"))
        self._echo = echo
        self._lengths: Counter[int] = Counter()  # characters that were sent of each answer

    def begin(self) -> list[dict[str, Any]]:
        """The prompts under `echo`; the first chunk says which safety prefix is in force."""
        chunks = [
            self._wrap(index, {"text": self._exchange.find_prompt(index).text * self._echo})
            for index in range(self._exchange.num_answers if self._echo else 1)
        ]
        chunks[0]["safety"] = self._exchange.build_safety()
        return chunks

    def _describe_pieces(self, index: int, text: str, pieces: list[TextPiece]) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": text}
        if scored := [piece for piece in pieces if piece.logprob is not None]:
            choice["logprobs"] = describe_completion_logprobs(
                [piece.logprob for piece in scored], [piece.token_id for piece in scored],
                self._exchange.names, lengths=[len(piece.text) for piece in scored],
                offset=self._lengths[index],
            )  # fmt: skip
        if self._exchange.wants_routing:
            choice["routing"] = describe_pieces(pieces)
        self._lengths[index] += len(text)
        return choice

    def _describe_end(self) -> dict[str, Any]:
        return {"text": ""}
