"""`GET /v1/models`, and what the operator's dashboards and other servers' clients look up."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from tramontane.engine.sampling_params import PARAM_NAMES
from tramontane.server.params import find_defaults
from tramontane.server.ports import ServingEngine
from tramontane.server.protocol.answers import ModelCard, ModelFacts, ModelList
from tramontane.server.state import ServerState
from tramontane.server.wiring import get_state

router = APIRouter()
State = Annotated[ServerState, Depends(get_state)]


@router.get("/v1/models")
async def list_models(state: State) -> ModelList:
    """The model that is served, under its first name; the others are aliases."""
    return {"object": "list", "data": [build_card(state.engine, state)]}


@router.get("/v1/models/{model:path}")
async def find_model(model: str, state: State) -> ModelCard:
    """One model by any of its names, which may hold slashes."""
    state.require_engine(model)
    return build_card(state.engine, state)


@router.get("/props")
async def show_props(state: State) -> dict[str, Any]:
    """The defaults in force, and which of them the model's generation_config.json has set."""
    engine = state.engine
    return {
        "model": state.model_name,
        "default_generation_settings": list_defaults(engine),
        "generation_config_overrides": dict(engine.generation_overrides),
        "safe_prompt": state.settings.safe_prompt,
        "max_model_len": engine.model.max_seq_len,
        "return_routed_experts": state.settings.enable_return_routed_experts,
    }


def build_card(engine: ServingEngine, state: ServerState) -> ModelCard:
    """What three interfaces say of a model."""
    model, name = engine.model, state.model_name
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "tramontane",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_seq_len,
        "type": "base",
        "max_context_length": model.max_seq_len,
        "aliases": list(state.model_names[1:]),
        "capabilities": {
            "completion_chat": True, "completion_fim": False, "function_calling": False,
            "fine_tuning": False, "vision": False,
        },
        "tramontane": _build_facts(engine),
    }  # fmt: skip


def list_defaults(engine: ServingEngine) -> dict[str, Any]:
    """What applies where a request says nothing; max_tokens only if the model sets it."""
    params = find_defaults(engine)
    values = {name: getattr(params, name) for name in PARAM_NAMES}
    if "max_tokens" not in engine.generation_overrides:
        del values["max_tokens"]
    return values


def _build_facts(engine: ServingEngine) -> ModelFacts:
    model = engine.model
    return {
        "chat_format": engine.chat_format is not None,
        "n_layers": model.n_layers,
        "num_experts": model.num_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "num_parameters": model.num_parameters,
        "num_active_parameters": model.num_active_parameters,
        "default_params": list_defaults(engine),
    }
