r"""Logarithms of chances in the three shapes of the interfaces.

A token that is no text of its own, a part of a character, is written "bytes:\xe2", as OpenAI did.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from tramontane.engine.completion import TokenLogprob
from tramontane.server.protocol.answers import CompletionLogprobs, TokenLogprobs, TopLogprob
from tramontane.tokenizer.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no infinity; vLLM's number


class TokenNames:
    """How tokens are written. Of ids beyond the tokenizer (a padded head) the number stands."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._control = {token_id: name for name, token_id in tokenizer.control_ids.items()}

    def name(self, token_id: int) -> str:
        """The text of one token."""
        if token_id in self._control:
            return self._control[token_id]
        data = self.spell(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def spell(self, token_id: int) -> bytes:
        """The bytes of one token; none of a control token."""
        if not 0 <= token_id < self._tokenizer.vocab_size:
            return f"<{token_id}>".encode()
        return self._tokenizer.decode_bytes([token_id])

    def name_all(self, ids: Iterable[int]) -> list[str]:
        """The texts of several."""
        return [self.name(token_id) for token_id in ids]


def describe_chat_logprobs(
    logprobs: Iterable[TokenLogprob], names: TokenNames
) -> list[TokenLogprobs]:
    """`logprobs.content` of a conversation's answer."""
    return [
        {
            **_describe_top(entry.token_id, entry.logprob, names),
            "top_logprobs": [_describe_top(i, value, names) for i, value in entry.top],
        }
        for entry in logprobs
    ]


def describe_completion_logprobs(
    logprobs: Sequence[TokenLogprob | None], ids: Sequence[int], names: TokenNames, *,
    lengths: Iterable[int], offset: int = 0,
) -> CompletionLogprobs:  # fmt: skip
    """Parallel lists for the tokens `ids`, of so many characters; the text begins at `offset`."""
    offsets = list(accumulate(lengths, initial=offset))[:-1]
    return {
        "tokens": names.name_all(ids),
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [None if entry is None else _list_top(entry, names) for entry in logprobs],
        "text_offset": offsets,
    }


def describe_prompt_logprobs(
    logprobs: Iterable[TokenLogprob | None], names: TokenNames
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: for each token its id and the likeliest ids at its place."""
    return [None if entry is None else _by_id(entry, names) for entry in logprobs]


def _describe_top(token_id: int, logprob: float, names: TokenNames) -> TopLogprob:
    spelled = names.spell(token_id)
    return {
        "token": names.name(token_id),
        "logprob": _finite(logprob),
        "bytes": list(spelled) if spelled else None,
    }


def _list_top(entry: TokenLogprob, names: TokenNames) -> dict[str, float]:
    """The likeliest tokens and the one itself; of tokens with one name the likelier."""
    found: dict[str, float] = {}
    for token_id, value in (*entry.top, (entry.token_id, entry.logprob)):
        name = names.name(token_id)
        found[name] = max(_finite(value), found.get(name, _LOWEST))
    return found


def _by_id(entry: TokenLogprob, names: TokenNames) -> dict[str, Any]:
    ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, start=1)}
    listed = {entry.token_id: entry.logprob, **dict(entry.top)}
    return {
        str(token_id): {
            "logprob": _finite(value),
            "rank": ranks.get(token_id),
            "decoded_token": names.name(token_id),
        }
        for token_id, value in listed.items()
    }


def _finite(value: float) -> float:
    return max(value, _LOWEST)
