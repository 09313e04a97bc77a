"""`tramontane serve`: the HTTP server."""

import asyncio
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tramontane.cli.notices import say
from tramontane.cli.serve_flags import AccessFlags, EngineFlags, ServiceFlags, build_settings
from tramontane.errors import ConfigError
from tramontane.server.settings import ServerSettings, is_loopback

if TYPE_CHECKING:
    from tramontane.engine.async_engine import AsyncEngine
    from tramontane.server.ports import ServingEngine

_BUNDLED_NAME = "tramontane"
_ACCESS, _SERVICE, _ENGINE = AccessFlags(), ServiceFlags(), EngineFlags()


def serve(
    model: str | None = None,
    /,
    *,
    access: Annotated[AccessFlags, Parameter(name="*")] = _ACCESS,
    service: Annotated[ServiceFlags, Parameter(name="*")] = _SERVICE,
    engine: Annotated[EngineFlags, Parameter(name="*")] = _ENGINE,
) -> None:
    """Serve a model over HTTP: OpenAI's and Mistral's interfaces, and a page for people.

    Listens on this machine alone unless told otherwise, and opens no connection itself. SIGTERM and
    Ctrl-C end it in order, a second one at once. See docs/serving.md.

    Parameters
    ----------
    model
        A folder or file in any layout (Hugging Face, Mistral, GGUF), or the id of a model that has
        been pulled; without it, the bundled model.
    access
        Who may ask.
    service
        How much one client may ask, and what answers say.
    engine
        What the engine runs.
    """
    settings = build_settings(access, service)  # what is wrong is said before anything is loaded
    try:
        from tramontane.server.listener import open_socket, run_server
        from tramontane.server.state import ServerState
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tramontane serve needs the package {error.name}: pip install 'tramontane[serve]'"
        ) from error
    from tramontane.engine.limits import EngineLimits

    EngineLimits(**engine.list_limits())
    engine.build_patience()
    _configure_log(log_requests=service.log_requests)
    name = _name_model(model)
    listening = open_socket(settings)
    port = listening.getsockname()[1]
    _announce_start(settings, name, port)
    start = time.perf_counter()

    def say_ready(loaded: "ServingEngine") -> None:
        _announce_ready(loaded, seconds=time.perf_counter() - start)

    state = ServerState(settings)
    load = partial(_load_engine, model, name, engine)
    asyncio.run(run_server(state, load, listening, on_ready=say_ready))
    say("stopped")


def _load_engine(model: str | None, name: str, flags: EngineFlags) -> "AsyncEngine":
    """The model in memory and an engine around it, not yet started. Raises as LLM does."""
    from tramontane.engine.async_engine import AsyncEngine
    from tramontane.engine.llm import LLM
    from tramontane.hub.cache import resolve_model

    llm = LLM(
        None if model is None else resolve_model(model),
        quant=flags.quant,
        max_model_len=flags.max_model_len,
        **flags.list_limits(),
    )
    longest = llm.sequences.max_seq_len
    engine = AsyncEngine(llm, name=name, patience=flags.build_patience())
    if engine.model.max_seq_len < longest:
        say(
            f"context      {engine.model.max_seq_len} of {longest} tokens, as many as the cache of "
            "--kv-cache-memory-bytes holds"
        )
    return engine


def _name_model(model: str | None) -> str:
    """What clients call it: the id of a pulled model, or the last part of a path."""
    if model is None:
        return _BUNDLED_NAME
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


def _configure_log(*, log_requests: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("tramontane.server").setLevel(
        logging.INFO if log_requests else logging.WARNING
    )


def _announce_start(settings: ServerSettings, name: str, port: int) -> None:
    """The resolved configuration; how many keys there are, and not which."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    names = ", ".join(settings.served_model_names or (name,))
    keys = len(settings.api_keys)
    say(f"listening    http://{host}:{port}")
    say(f"model        {names}: loading")
    access = f"API keys: {keys}" if keys else "no API key: open to this machine"
    say(f"access       {access}")
    if not is_loopback(settings.host):
        say("warning      the connection is not encrypted: put a TLS proxy in front")
    say(
        f"limits       rate {settings.rate_limit or 'any'} per minute, "
        f"concurrency {settings.max_concurrency or 'any'}, "
        f"body {settings.max_body_bytes} bytes, connections {settings.max_connections}"
    )
    say(f"safe prompt  {settings.safe_prompt}")


def _announce_ready(engine: "ServingEngine", *, seconds: float) -> None:
    from tramontane.cli.stats import format_params
    from tramontane.server.params import find_defaults

    model = engine.model
    say(
        f"ready        after {seconds:.1f} s: {model.num_parameters:,} parameters, "
        f"{model.num_active_parameters:,} active, context {model.max_seq_len}"
    )
    if engine.chat_format is None:
        say("chat         the model has no chat format: messages are read as one plain text")
    if engine.generation_overrides:
        given = ", ".join(f"{key} {value}" for key, value in engine.generation_overrides.items())
        say(f"defaults     {given} (from the model's generation_config.json)")
    say(f"settings     {format_params(find_defaults(engine))}")
