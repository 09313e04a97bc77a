"""`POST /v1/completions`, and what is said of filling in the middle."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from tramontane.server.completion_writer import CompletionChunks, build_text_answer
from tramontane.server.errors import invalid, unsupported
from tramontane.server.exchange import Exchange
from tramontane.server.prompts import write_completion_prompts
from tramontane.server.protocol.answers import TextAnswer
from tramontane.server.protocol.completions import COMPLETION_UNSUPPORTED, CompletionRequest
from tramontane.server.reply import reply
from tramontane.server.state import ServerState
from tramontane.server.streaming import STREAM
from tramontane.server.wiring import get_state

router = APIRouter()
_DEFAULT_MAX_TOKENS = 16  # OpenAI's


@router.post("/v1/completions", responses={200: {"model": TextAnswer, **STREAM}})
async def create_completion(
    body: CompletionRequest, http: Request, state: Annotated[ServerState, Depends(get_state)]
) -> Response:
    """Go on with one text or several."""
    body.require_supported(COMPLETION_UNSUPPORTED)
    _check_combinations(body)
    exchange = Exchange(state, http, body, "prompt")
    prompts = await write_completion_prompts(
        body.prompt, exchange.engine, param="prompt", is_prefixed=exchange.is_prefixed,
        add_special_tokens=body.add_special_tokens is not False,
        must_fit=body.truncate_prompt_tokens is None,
    )  # fmt: skip
    exchange.add_prompts(
        prompts, max_tokens=body.max_tokens, default=_DEFAULT_MAX_TOKENS, logprobs=body.logprobs,
        echoes_logprobs=bool(body.echo) and body.logprobs is not None,
    )  # fmt: skip
    echo = bool(body.echo)
    return await reply(
        exchange, partial(CompletionChunks, echo=echo), partial(build_text_answer, echo=echo)
    )


@router.post("/v1/fim/completions", include_in_schema=False)
async def refuse_fim() -> Response:
    """Mistral's route for models that fill in the middle, which Mixtral 8x7B is none of."""
    raise invalid(
        "this model was not trained to fill in the middle: use /v1/completions", None,
        code="unsupported_model",
    )  # fmt: skip


def _check_combinations(body: CompletionRequest) -> None:
    if body.best_of not in (None, body.n or 1):
        raise unsupported("best_of", "leave it out, or set it to n; choose by logprobs yourself")
    if body.echo and body.stream and body.logprobs is not None:
        raise unsupported("echo", "with logprobs it cannot be streamed; set stream to false")
