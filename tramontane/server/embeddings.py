"""`POST /v1/embeddings`: the mean of a text's final hidden states."""

import base64
import uuid
from dataclasses import replace
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from tramontane.engine.request import Request
from tramontane.server.errors import invalid
from tramontane.server.exchange import note_unknown
from tramontane.server.generation import Generation
from tramontane.server.json_text import JsonResponse
from tramontane.server.ports import ServedModel
from tramontane.server.prompts import fit, write_completion_prompts
from tramontane.server.protocol.answers import EmbeddingAnswer, EmbeddingItem
from tramontane.server.protocol.embeddings import EmbeddingRequest
from tramontane.server.state import ServerState
from tramontane.server.wiring import get_state

router = APIRouter()


@router.post("/v1/embeddings", responses={200: {"model": EmbeddingAnswer}})
async def create_embeddings(
    body: EmbeddingRequest, http: HttpRequest, state: Annotated[ServerState, Depends(get_state)]
) -> Response:
    """Embed one text or several."""
    engine = state.require_engine(body.model)
    dim = _read_dimensions(body, engine.model)
    prompts = await write_completion_prompts(
        body.input, engine, is_prefixed=False, add_special_tokens=True, must_fit=True, param="input"
    )
    params = replace(engine.default_params, max_tokens=0, min_tokens=0)
    for prompt in prompts:
        fit(prompt, engine, max_tokens=0, default=None, truncate=None, param="input")
    requests = [
        Request(
            prompt_ids=prompt.ids, params=params, wants_embedding=True,
            tenant=http.state.tenant, cache_salt=body.cache_salt or "",
        )
        for prompt in prompts
    ]  # fmt: skip
    async with Generation(
        state, requests, receive=http.receive, started_at=http.state.started_at, param="input"
    ) as generation:
        answers = await generation.collect()
    vectors = [_shorten(answer.completion.embedding, dim) for answer in answers]
    num_tokens = sum(len(prompt.ids) for prompt in prompts)
    is_base64 = body.encoding_format == "base64"
    answer: EmbeddingAnswer = {
        "id": f"embd-{uuid.uuid4().hex}",
        "object": "list",
        "data": [_build_item(i, v, is_base64=is_base64) for i, v in enumerate(vectors)],
        "model": state.model_name,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
    }
    return JsonResponse(answer, headers=note_unknown(state, body))


def _read_dimensions(body: EmbeddingRequest, model: ServedModel) -> int:
    """How many of the numbers to send. Raises ApiError 400 if there are fewer."""
    name = "dimensions" if body.dimensions is not None else "output_dimension"
    wanted = body.dimensions if body.dimensions is not None else body.output_dimension
    if wanted is not None and wanted > model.dim:
        raise invalid(f"{name} is {wanted}; this model's vectors have {model.dim}", name)
    return wanted or model.dim


def _shorten(vector: np.ndarray | None, dim: int) -> np.ndarray:
    """The first `dim` numbers, at length 1, as OpenAI does; all of them as they are."""
    assert vector is not None, "the engine was asked for an embedding"
    if dim == len(vector):
        return vector
    cut = vector[:dim].astype(np.float64)
    length = np.linalg.norm(cut)
    return cut / length if length > 0 else cut


def _build_item(index: int, vector: np.ndarray, *, is_base64: bool) -> EmbeddingItem:
    if is_base64:
        embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
        return {"object": "embedding", "index": index, "embedding": embedding}
    return {"object": "embedding", "index": index, "embedding": vector.tolist()}
