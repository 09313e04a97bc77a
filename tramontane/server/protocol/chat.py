"""`POST /v1/chat/completions`: what may come in."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tramontane.server.protocol.base import ApiModel, Ignored
from tramontane.server.protocol.sampling import UNSUPPORTED, NumLogprobs, SamplingFields

MAX_MESSAGES = 4096
MAX_PARTS = 1024
_TOOLS = "this model has no format for tools; leave it out, or set tool_choice to none"

CHAT_UNSUPPORTED = {
    **UNSUPPORTED,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "audio": "only text is written",
    "web_search_options": "this server opens no connection",
    "chat_template": "the model's own template is used",
    "chat_template_kwargs": "the model's own template is used as it is",
    "documents": "put their text into a message",
    "add_special_tokens": "the chat format writes the special tokens",
    "echo": "use /v1/completions",
}


class ContentPart(ApiModel):
    """A part of a message; only text is read."""

    type: Annotated[str, Field(max_length=64)]
    text: str | None = None


Parts = Annotated[list[ContentPart], Field(fail_fast=True, max_length=MAX_PARTS)]


class ChatMessage(ApiModel):
    """One message; `prefix` marks an answer that the model is to continue (Mistral)."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    prefix: bool | None = None
    tool_calls: Any = None
    tool_call_id: str | None = None


Messages = Annotated[
    list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
]


class ChatRequest(SamplingFields):
    """The body."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Ignored = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    prediction: Ignored = None
