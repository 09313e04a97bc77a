"""`POST /tokenize` and `/detokenize`: what comes in and goes out (vLLM's)."""

from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from tramontane.server.protocol.base import MAX_ENCODED, ApiRequest, TokenId
from tramontane.server.protocol.chat import CHAT_UNSUPPORTED, Messages

TOKENIZE_UNSUPPORTED = {
    name: CHAT_UNSUPPORTED[name] for name in ("chat_template", "chat_template_kwargs", "documents")
} | {"tools": CHAT_UNSUPPORTED["functions"]}


class TokenizeRequest(ApiRequest):
    """A text, or the messages of a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ApiRequest):
    """Token ids of a text."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_ENCODED)]


class TokenizeAnswer(TypedDict):
    """The ids, and how many there may be."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str] | None]


class DetokenizeAnswer(TypedDict):
    """The text."""

    prompt: str


class TokenizerInfo(TypedDict):
    """The control tokens, for clients that write prompts themselves."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    add_bos_token: bool
    bos_token: str
    eos_token: str
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
