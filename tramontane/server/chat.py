"""`POST /v1/chat/completions`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from tramontane.server.chat_writer import ChatChunks, build_chat_answer
from tramontane.server.errors import blame, invalid, unsupported
from tramontane.server.exchange import Exchange
from tramontane.server.prompts import write_chat_prompt
from tramontane.server.protocol.answers import ChatAnswer
from tramontane.server.protocol.chat import CHAT_UNSUPPORTED, ChatRequest
from tramontane.server.reply import reply
from tramontane.server.state import ServerState
from tramontane.server.streaming import STREAM
from tramontane.server.wiring import get_state

router = APIRouter()


@router.post("/v1/chat/completions", responses={200: {"model": ChatAnswer, **STREAM}})
async def create_chat_completion(
    body: ChatRequest, http: Request, state: Annotated[ServerState, Depends(get_state)]
) -> Response:
    """Answer the last message of a conversation."""
    body.require_supported(CHAT_UNSUPPORTED)
    require_no_tools(body)
    exchange = Exchange(state, http, body, "messages")
    with blame("messages"):
        prompt = await write_chat_prompt(
            body.messages, exchange.engine, is_prefixed=exchange.is_prefixed,
            continue_final=bool(body.continue_final_message),
            must_fit=body.truncate_prompt_tokens is None,
        )  # fmt: skip
    max_tokens = body.max_tokens if body.max_completion_tokens is None else (
        body.max_completion_tokens
    )  # fmt: skip
    exchange.add_prompts(
        [prompt], max_tokens=max_tokens, default=None, logprobs=_read_logprobs(body)
    )
    return await reply(exchange, ChatChunks, build_chat_answer)


def require_no_tools(body: ChatRequest) -> None:
    """Raises ApiError 400 if an answer could have to be a call of a tool."""
    if body.tool_choice == "none":
        return
    remedy = 'this model has no format for tools; leave it out, or set tool_choice to "none"'
    if body.tools:
        raise unsupported("tools", remedy)
    if body.tool_choice not in (None, "auto"):
        raise unsupported("tool_choice", remedy)


def _read_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None
