"""Mistral's instruction format, versions 1 to 3, with the ids of mistral-common.

v1, Mixtral 8x7B:  <s> [INST] first [/INST] answer</s> [INST] next [/INST]
v2, v3, 8x22B:     <s>[INST] first[/INST] answer</s>[INST] next[/INST]

The system's text stands before the first message of the user (v1) or the last, with an empty line
between. In v1 [INST] is plain text, encoded in one piece with what the user says; later it is a
token.
Tools are not written here: give such a model's own template.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from tramontane.errors import RequestError, TokenizerError
from tramontane.tokenizer.chat import Message, check_messages
from tramontane.tokenizer.tokenizer import BOS_TOKEN, EOS_TOKEN, Tokenizer

VERSIONS = (1, 2, 3)
GGUF_VERSION_KEY = "tramontane.mistral_format"  # which of them, in a file's metadata
_BEGIN, _END = "[INST]", "[/INST]"
_MAY_FOLLOW = {
    "system": {None, "system", "user"},
    "user": {None, "system", "user", "assistant"},
    "assistant": {None, "system", "user", "assistant"},
}


class _Turn(NamedTuple):
    """What one side says, its messages in a row joined."""

    is_user: bool
    text: str


class MistralFormat:
    """The format of one version. Roles are system, user and assistant; no answer may be empty."""

    def __init__(self, version: int = 1) -> None:
        if version not in VERSIONS:
            raise TokenizerError(f"Mistral's format v{version} is unknown; there are v1, v2 and v3")
        self.version = version

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, continue_final: bool = False
    ) -> list[int]:
        """Token ids, <s> first. Raises RequestError, or TokenizerError without [INST] in v2."""
        turns = self._list_turns(messages, continue_final=continue_final)
        ids = [tokenizer.bos_id]
        for is_last, turn in _mark_last(turns):
            if turn.is_user:
                ids += self._encode_user(turn.text, tokenizer)
            else:
                ids += tokenizer.encode(turn.text, eos=not (is_last and continue_final))
        return ids

    def render(self, messages: Sequence[Message], *, continue_final: bool = False) -> str:
        """The conversation with the names of control tokens. Raises RequestError."""
        turns = self._list_turns(messages, continue_final=continue_final)
        user = " {begin} {text} {end}" if self.version == 1 else "{begin} {text}{end}"
        parts = [BOS_TOKEN]
        for is_last, turn in _mark_last(turns):
            if turn.is_user:
                parts.append(user.format(begin=_BEGIN, text=turn.text, end=_END))
            else:
                parts.append(" " + turn.text + EOS_TOKEN * (not (is_last and continue_final)))
        return "".join(parts)

    def _encode_user(self, text: str, tokenizer: Tokenizer) -> list[int]:
        if self.version == 1:
            return tokenizer.encode(f"{_BEGIN} {text} {_END}")
        return [_find(_BEGIN, tokenizer), *tokenizer.encode(text), _find(_END, tokenizer)]

    def _list_turns(self, messages: Sequence[Message], *, continue_final: bool) -> list[_Turn]:
        """User and assistant in turn; the system's text goes to the first user (v1) or the last."""
        checked = check_messages(messages, continue_final=continue_final)
        _check_order(checked)
        system = _join(message for message in checked if message["role"] == "system")
        turns = [
            _Turn(role == "user", _join(group))
            for role, group in groupby(checked, key=lambda message: message["role"])
            if role != "system"
        ]
        if not turns or not turns[0].is_user:
            turns.insert(0, _Turn(True, ""))
        at = 0 if self.version == 1 else max(i for i, turn in enumerate(turns) if turn.is_user)
        if system:
            turns[at] = _Turn(True, system + "\n\n" + turns[at].text)
        if self.version > 1:
            turns = [
                turn if turn.is_user else _Turn(False, turn.text.rstrip(" ")) for turn in turns
            ]
        return turns


def _check_order(messages: Sequence[dict[str, Any]]) -> None:
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        raise RequestError("the only message is the assistant's: put one of the user before it")
    before = None
    for number, message in enumerate(messages):
        role = message["role"]
        if role not in _MAY_FOLLOW or before not in _MAY_FOLLOW[role]:
            where = f"after {before}" if role in _MAY_FOLLOW else "in Mistral's format"
            raise RequestError(f"message {number} has role {role!r}, which cannot stand {where}")
        if role == "assistant" and not message["content"]:
            raise RequestError(f"message {number}, the assistant's, is empty: leave it out")
        before = role


def _join(messages: Iterator[dict[str, Any]]) -> str:
    return "\n\n".join(message["content"] for message in messages if message["content"])


def _mark_last(turns: Sequence[_Turn]) -> Iterator[tuple[bool, _Turn]]:
    return ((number == len(turns), turn) for number, turn in enumerate(turns, start=1))


def _find(name: str, tokenizer: Tokenizer) -> int:
    if name not in tokenizer.control_ids:
        raise TokenizerError(
            f"the vocabulary has no control token {name}, which Mistral's format has since v2: "
            f"use MistralFormat(1)"
        )
    return tokenizer.control_ids[name]
