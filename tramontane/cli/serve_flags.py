"""The flags of `tramontane serve`, as groups: who may ask, how much, and what the engine runs."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from tramontane.cli.notices import say
from tramontane.engine.pulse import Patience
from tramontane.errors import ConfigError
from tramontane.server.settings import SafetyPolicy, ServerSettings, parse_keys

_DEFAULTS = ServerSettings()
_PATIENCE = Patience()


def _flag(help: str, **more: Any) -> Parameter:
    return Parameter(help=help, negative=(), **more)


@dataclass(frozen=True)
class AccessFlags:
    """Who may ask."""

    host: Annotated[str, _flag("Address to listen on; others than this machine need a key.")] = (
        _DEFAULTS.host
    )
    port: Annotated[int, _flag("Port to listen on.")] = _DEFAULTS.port
    api_key: Annotated[
        tuple[str, ...],
        _flag(
            "A key that opens the server; may be repeated. On a command line others can see it.",
            env_var="TRAMONTANE_API_KEY", show_default=False, show_env_var=True,
        ),
    ] = ()  # fmt: skip
    api_key_file: Annotated[Path | None, _flag("A file with a key a line.")] = None
    allowed_host: Annotated[
        tuple[str, ...],
        _flag("A name by which browsers may reach the server; may be repeated; * is any."),
    ] = ()
    allowed_origin: Annotated[
        tuple[str, ...],
        _flag("A site whose pages may use the server, such as https://chat.example; * is any."),
    ] = ()

    def list_keys(self) -> tuple[str, ...]:
        """All keys. Raises ConfigError, naming the file, if it cannot be used."""
        return self.api_key + (() if self.api_key_file is None else read_keys(self.api_key_file))


@dataclass(frozen=True)
class ServiceFlags:
    """How much one client may ask, and what answers say."""

    served_model_name: Annotated[
        tuple[str, ...], _flag("Name of the model in requests and answers; more are aliases.")
    ] = ()
    safe_prompt: Annotated[
        SafetyPolicy,
        _flag("Mistral's safety prefix: for nobody, for who asks, or for all, ask or not."),
    ] = _DEFAULTS.safe_prompt
    rate_limit: Annotated[int | None, _flag("Requests per minute and key.")] = None
    max_concurrency: Annotated[int | None, _flag("Requests at a time and key.")] = None
    max_body_bytes: Annotated[int, _flag("Size of a request.")] = _DEFAULTS.max_body_bytes
    max_connections: Annotated[int, _flag("Connections at a time.")] = _DEFAULTS.max_connections
    price_per_hour: Annotated[
        float | None, _flag("What the machine costs, in dollars: usage then names a price.")
    ] = None
    enable_return_routed_experts: Annotated[
        bool, _flag("Put the experts of all tokens into each answer, as vLLM does.")
    ] = False
    shutdown_timeout: Annotated[
        float, _flag("Seconds that running requests have after SIGTERM or Ctrl-C.")
    ] = _DEFAULTS.shutdown_timeout
    log_requests: Annotated[bool, Parameter(help="Say each request on standard error.")] = True


@dataclass(frozen=True)
class EngineFlags:
    """What the engine runs."""

    quant: Annotated[
        Literal["int8", "int4"] | None,
        _flag("Round the weights of experts and attention while they are read."),
    ] = None
    max_model_len: Annotated[
        int | None, _flag("Tokens of prompt and answer; by default what the model was made for.")
    ] = None
    max_num_seqs: Annotated[int, _flag("Answers that run at a time.")] = 128
    max_num_batched_tokens: Annotated[int, _flag("Tokens of one pass.")] = 512
    max_waiting: Annotated[int, _flag("Requests that wait; more are told to come again.")] = 512
    kv_cache_memory_bytes: Annotated[
        int, _flag("Memory for keys and values at most, in bytes.")
    ] = 4 * 2**30

    hang_seconds: Annotated[
        float, _flag("Seconds that a pass may stand still before /health says so.")
    ] = _PATIENCE.hang_seconds
    max_pass_seconds: Annotated[
        float, _flag("Seconds that a pass may compute before it counts as endless.")
    ] = _PATIENCE.max_pass_seconds

    def list_limits(self) -> dict[str, Any]:
        """What `EngineLimits` takes."""
        names = ("max_num_seqs", "max_num_batched_tokens", "max_waiting", "kv_cache_memory_bytes")
        return {name: getattr(self, name) for name in names}

    def build_patience(self) -> Patience:
        """Raises ConfigError, naming the value."""
        return Patience(hang_seconds=self.hang_seconds, max_pass_seconds=self.max_pass_seconds)


def build_settings(access: AccessFlags, service: ServiceFlags) -> ServerSettings:
    """Raises ConfigError, naming the flag."""
    return ServerSettings(
        host=access.host,
        port=access.port,
        api_keys=access.list_keys(),
        allowed_hosts=access.allowed_host,
        allowed_origins=access.allowed_origin,
        served_model_names=service.served_model_name,
        safe_prompt=service.safe_prompt,
        rate_limit=service.rate_limit,
        max_concurrency=service.max_concurrency,
        max_body_bytes=service.max_body_bytes,
        max_connections=service.max_connections,
        price_per_hour=service.price_per_hour,
        enable_return_routed_experts=service.enable_return_routed_experts,
        shutdown_timeout=service.shutdown_timeout,
    )


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file. Raises ConfigError if there are none, OSError if it cannot be read."""
    try:
        keys = parse_keys(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}") from error
    if not keys:
        raise ConfigError(f"{path} holds no key: write one a line")
    if os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        say(f"warning: others on this machine can read the keys in {path}: chmod 600 {path}")
    return keys
