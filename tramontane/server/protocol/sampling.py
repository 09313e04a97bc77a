"""The fields of a request that say how to choose tokens; names and ranges of the interfaces."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from tramontane.engine.sampling_params import MAX_LISTED_IDS, MAX_STOP_LENGTH, MAX_STOPS
from tramontane.server.protocol.base import (
    ApiRequest,
    CacheSalt,
    Choices,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
    TokenId,
)


def _bound_bias(value: Any) -> Any:
    """Before each of its items is looked at."""
    if isinstance(value, dict) and len(value) > MAX_LISTED_IDS:
        raise ValueError(f"it has {len(value)} items; there may be {MAX_LISTED_IDS}")
    return value


def _refuse_zero(value: int) -> int:
    if value == 0:
        raise ValueError("say how many tokens to keep, or -1 for those that fit")
    return value


StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopTexts = Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOPS)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=MAX_LISTED_IDS)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
BiasMap = Annotated[dict[str, Bias], Field(max_length=MAX_LISTED_IDS), BeforeValidator(_bound_bias)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
TokenCount = Annotated[int, Field(ge=0, le=1_000_000)]
KeptTokens = Annotated[
    int,
    Field(ge=-1, le=1_000_000, json_schema_extra={"not": {"const": 0}}),
    AfterValidator(_refuse_zero),
]
NumAnswers = Annotated[int, Field(ge=1, le=128)]
NumLogprobs = Annotated[int, Field(ge=0, le=20)]
_OLD = Field(json_schema_extra={"deprecated": True})  # pydantic's own mark warns when it is read

# What the interfaces know and this server does not do, with what to do instead.
UNSUPPORTED = {
    "use_beam_search": "leave it out; there is sampling alone",
    "bad_words": "use logit_bias with -100 for the tokens",
    "prompt_embeds": "send the text or its token ids",
    "structural_tag": "use structured_outputs with json, regex, choice or grammar",
    "prompt_mode": "leave it out",
    "guardrails": "use safe_prompt",
    "priority": "leave it out; requests are served first come, first served",
}


class SamplingFields(ApiRequest):
    """OpenAI's fields, vLLM's and Mistral's additions, and three of our own.

    `return_routing` asks for the experts of each token of the answer ("answer") or of the prompt
    too ("all"); `experts_per_token` sets through how many experts each token runs.
    """

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    seed: Seed | None = None
    random_seed: Seed | None = None
    stop: StopText | StopTexts | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: TokenCount | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: Literal[True] | None = None
    n: NumAnswers | None = None
    logit_bias: BiasMap | None = None
    allowed_token_ids: TokenIds | None = None
    prompt_logprobs: NumLogprobs | bool | None = None
    top_prompt_logprobs: NumLogprobs | None = None
    truncate_prompt_tokens: KeptTokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Annotated[dict[str, Any] | str | None, _OLD] = None
    guided_regex: Annotated[str | None, _OLD] = None
    guided_choice: Annotated[Choices | None, _OLD] = None
    guided_grammar: Annotated[str | None, _OLD] = None
    cache_salt: CacheSalt | None = None
    return_token_ids: bool | None = None
    experts_per_token: Annotated[int, Field(ge=1, le=1024)] | None = None
    return_routing: Literal["none", "answer", "all"] | None = None
    routed_experts_prompt_start: TokenCount | None = None
    safe_prompt: bool | None = None
    safe_mode: bool | None = None
