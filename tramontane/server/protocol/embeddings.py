"""`POST /v1/embeddings`: what may come in."""

from typing import Annotated, Literal

from pydantic import Field

from tramontane.server.protocol.base import ApiRequest, CacheSalt, Ignored
from tramontane.server.protocol.completions import IdPrompt, IdPrompts, Prompts


class EmbeddingRequest(ApiRequest):
    """The body; `output_dimension` and `output_dtype` are Mistral's."""

    input: str | IdPrompt | Prompts | IdPrompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    output_dimension: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    output_dtype: Literal["float"] | None = None
    cache_salt: CacheSalt | None = None
    user: Ignored = None
