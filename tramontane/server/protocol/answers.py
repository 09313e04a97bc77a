"""What goes out, as typed dictionaries: the OpenAPI document is made from them, and nothing runs.

Fields that OpenAI's interface lacks are vLLM's (stop_reason, prompt_logprobs, token_ids,
routed_experts), llama-server's (timings), or ours (routing, safety, usage.cost).
"""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict


class ErrorDetail(TypedDict):
    """What is wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class ErrorAnswer(TypedDict):
    """Any error; `object` and `message` are for Mistral's first clients."""

    error: ErrorDetail
    object: Literal["error"]
    message: str


class PromptDetails(TypedDict):
    """Of the prompt's tokens."""

    cached_tokens: int


class Cost(TypedDict):
    """What a request took (docs/serving.md has the formulae)."""

    active_parameters: int
    flops: int
    expert_bytes_read: int
    cached_tokens: int
    usd_per_million_tokens: NotRequired[float]


class Usage(TypedDict):
    """Tokens, and the cost meter."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    cost: Cost


class Safety(TypedDict):
    """Which prefix was in force, and a digest of the ids that were read (safety.py)."""

    policy: Literal["off", "request", "always"]
    prefix: str | None
    prompt_sha256: list[str]


class RoutedPiece(TypedDict):
    """A token with its experts per layer, heaviest first; null for one that did not run."""

    text: str
    token_id: int
    experts: list[list[int]] | None
    weights: list[list[float]] | None


class TopLogprob(TypedDict):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    """A token, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Of the answer's tokens."""

    content: list[TokenLogprobs]
    refusal: None


class CompletionLogprobs(TypedDict):
    """Parallel lists, one entry per token; the first token of a prompt has null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class AnswerMessage(TypedDict):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


FinishReason = Literal["stop", "length"]


class Choice(TypedDict):
    """One answer, of whichever interface."""

    index: int
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    routing: NotRequired[list[RoutedPiece]]
    prompt_routing: NotRequired[list[RoutedPiece]]
    routed_experts: NotRequired[str]


class ChatChoice(Choice):
    """One answer of a conversation."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class TextChoice(Choice):
    """One answer to a prompt."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]
    prompt_token_ids: NotRequired[list[int]]


class WholeAnswer(TypedDict):
    """An answer that is no stream, of whichever interface."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    safety: Safety
    timings: dict[str, float]


class ChatAnswer(WholeAnswer):
    """The answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]
    prompt_token_ids: NotRequired[list[int]]


class TextAnswer(WholeAnswer):
    """The answers to prompts."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class EmbeddingItem(TypedDict):
    """One vector, as numbers or as base64 of little-endian fp32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int


class EmbeddingAnswer(TypedDict):
    """The vectors."""

    id: str
    object: Literal["list"]
    data: list[EmbeddingItem]
    model: str
    usage: EmbeddingUsage


class Capabilities(TypedDict):
    """Mistral's description of what a model can do."""

    completion_chat: bool
    completion_fim: bool
    function_calling: bool
    fine_tuning: bool
    vision: bool


class ModelFacts(TypedDict):
    """What the page needs to draw the experts; they are null in a dense model."""

    chat_format: bool
    n_layers: int
    num_experts: int | None
    num_experts_per_tok: int | None
    num_parameters: int
    num_active_parameters: int
    default_params: dict[str, Any]


class ModelCard(TypedDict):
    """The union of what OpenAI, vLLM and Mistral say of a model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int
    type: Literal["base"]
    max_context_length: int
    aliases: list[str]
    capabilities: Capabilities
    tramontane: ModelFacts


class ModelList(TypedDict):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[ModelCard]
