"""`/health`, which is honest, and what dashboards read."""

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from tramontane import __version__
from tramontane.server.json_text import JsonResponse
from tramontane.server.metrics import CONTENT_TYPE
from tramontane.server.state import ServerState
from tramontane.server.wiring import get_state

router = APIRouter()
State = Annotated[ServerState, Depends(get_state)]


@router.head("/health", include_in_schema=False)
@router.get("/health", operation_id="health")
@router.get("/ping", operation_id="ping")
async def check_health(state: State) -> Response:
    """200 while requests are answered; 503 while the model loads, at the end, and if it died."""
    state.require_healthy()
    return JsonResponse({"status": "ok"})


@router.get("/version")
async def show_version() -> dict[str, str]:
    """The version of tramontane."""
    return {"version": __version__}


@router.get("/load")
async def show_load(state: State) -> dict[str, int]:
    """Requests that are being answered."""
    return {"server_load": state.limits.num_running}


@router.get("/metrics", response_class=Response)
async def show_metrics(state: State) -> Response:
    """For Prometheus."""
    return Response(state.metrics.render(), media_type=CONTENT_TYPE)
