"""`POST /v1/completions`: what may come in."""

from typing import Annotated

from pydantic import Field

from tramontane.server.protocol.base import Ignored, TokenId
from tramontane.server.protocol.sampling import (
    UNSUPPORTED,
    NumAnswers,
    NumLogprobs,
    SamplingFields,
    TokenCount,
)

MAX_PROMPTS = 256
COMPLETION_UNSUPPORTED = {
    **UNSUPPORTED,
    "suffix": "this model was not trained to fill in the middle",
}

Prompts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
IdPrompt = Annotated[list[TokenId], Field(fail_fast=True, min_length=1)]
IdPrompts = Annotated[list[IdPrompt], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]


class CompletionRequest(SamplingFields):
    """The body. A prompt is text or token ids; there may be a list of either."""

    prompt: str | IdPrompt | Prompts | IdPrompts
    max_tokens: TokenCount | None = None
    best_of: NumAnswers | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    add_special_tokens: bool | None = None
    suffix: str | None = None
    user: Ignored = None
