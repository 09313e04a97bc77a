"""`POST /tokenize`, `/detokenize`, `GET /tokenizer_info`: the vocabulary (vLLM's routes)."""

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from tramontane.server.errors import blame, invalid
from tramontane.server.exchange import note_unknown
from tramontane.server.json_text import JsonResponse
from tramontane.server.logprobs import TokenNames
from tramontane.server.prompts import (
    Prompt,
    require_ids,
    run_aside,
    write_chat_prompt,
    write_completion_prompts,
)
from tramontane.server.protocol.tokenizing import (
    TOKENIZE_UNSUPPORTED,
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from tramontane.server.state import ServerState
from tramontane.server.wiring import get_state

router = APIRouter()
State = Annotated[ServerState, Depends(get_state)]


@router.post("/tokenize", responses={200: {"model": TokenizeAnswer}})
async def tokenize(body: TokenizeRequest, state: State) -> Response:
    """The ids of a text, or of a conversation as the model reads it."""
    body.require_supported(TOKENIZE_UNSUPPORTED)
    engine = state.require_engine(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("send either prompt or messages", "prompt")
    control_id = engine.tokenizer.control_ids.get(body.prompt or "")
    if control_id is not None and body.add_special_tokens is False:
        prompt = Prompt([control_id])  # lm-eval asks so for the id of "<s>"
    elif body.messages is not None:
        body.require_supported({"add_special_tokens": "the chat format writes the special tokens"})
        with blame("messages"):
            prompt = await write_chat_prompt(
                body.messages, engine, is_prefixed=state.settings.safe_prompt == "always",
                continue_final=bool(body.continue_final_message), must_fit=False,
            )  # fmt: skip
    else:
        (prompt,) = await write_completion_prompts(
            body.prompt or "", engine, param="prompt", is_prefixed=False,
            add_special_tokens=body.add_special_tokens is not False, must_fit=False,
        )  # fmt: skip
    names, headers = TokenNames(engine.tokenizer), note_unknown(state, body)

    def write() -> Response:
        answer: TokenizeAnswer = {
            "count": len(prompt.ids),
            "max_model_len": engine.model.max_seq_len,
            "tokens": prompt.ids,
            "token_strs": names.name_all(prompt.ids) if body.return_token_strs else None,
        }
        return JsonResponse(answer, headers=headers)

    return await run_aside(len(prompt.ids), write)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, state: State, response: Response) -> DetokenizeAnswer:
    """The text of ids; control tokens are silent."""
    engine = state.require_engine(body.model)
    if body.tokens:
        require_ids([body.tokens], engine.tokenizer.vocab_size, "tokens")
    response.headers.update(note_unknown(state, body))
    text = await run_aside(len(body.tokens), lambda: engine.tokenizer.decode(body.tokens))
    return {"prompt": text}


@router.get("/tokenizer_info")
async def show_tokenizer(state: State) -> TokenizerInfo:
    """The control tokens."""
    tokenizer = state.engine.tokenizer
    unk = next((n for n, i in tokenizer.control_ids.items() if i == tokenizer.unk_id), None)
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": state.engine.model.max_seq_len,
        "add_bos_token": tokenizer.adds_bos,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": None,
        "unk_token": unk,
        "chat_template": None,
    }
