"""Chat formats: how the messages of a conversation become the one sequence a model reads.

A model knows only the format it was trained with. Where formats come from: a template in the
model's folder or GGUF file (template_format.py), Mistral's own (mistral_format.py), and none at
all, for a base model (`PlainFormat`). chat_loading.py finds which one a model has.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tramontane.errors import RequestError
from tramontane.tokenizer.tokenizer import Tokenizer

Message = Mapping[str, Any]  # role and content, and what else a template may read, all JSON

ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatFormat(Protocol):
    """One way to write a conversation.

    If its last message is the user's, what is written ends where the answer begins. If it is the
    assistant's, the conversation is complete, as training needs it; with `continue_final` the
    model goes on with that message instead. Names of control tokens within a message are text.
    """

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, continue_final: bool = False
    ) -> list[int]:
        """Token ids, with control tokens. Raises RequestError if the messages do not fit."""

    def render(self, messages: Sequence[Message], *, continue_final: bool = False) -> str:
        """What `encode` encodes, as a person reads it. Raises RequestError."""


class PlainFormat:
    """For a base model, which has learnt no format: it goes on with the last message's text.

    The contents stand one after another with an empty line between, roles unmarked, one bos_id in
    front. [user "Once upon a time"] -> "Once upon a time".
    """

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, continue_final: bool = False
    ) -> list[int]:
        """bos_id and the contents; see ChatFormat."""
        text = self.render(messages, continue_final=continue_final)
        return tokenizer.encode(text, bos=tokenizer.adds_bos)

    def render(self, messages: Sequence[Message], *, continue_final: bool = False) -> str:
        """The contents with an empty line between."""
        checked = check_messages(messages, continue_final=continue_final)
        return "\n\n".join(message["content"] for message in checked if message["content"])


def check_messages(
    messages: Sequence[Message], *, continue_final: bool = False
) -> list[dict[str, Any]]:
    """Copies of `messages`, each with a known role and a text. Raises RequestError."""
    if not messages:
        raise RequestError("there are no messages: a conversation needs at least one")
    checked = [_check_message(message, number) for number, message in enumerate(messages)]
    if continue_final and checked[-1]["role"] != "assistant":
        raise RequestError(
            f"the last message is the {checked[-1]['role']}'s: only one of the assistant's can "
            f"be continued"
        )
    return checked


def _check_message(message: Message, number: int) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"message {number} has role {role!r}; it must be {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise RequestError(
            f"message {number} has a {type(content).__name__} for content; it must be a text"
        )
    return dict(message)
