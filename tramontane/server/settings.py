"""What an operator decides about the server; checked once, before anything listens."""

import ipaddress
from dataclasses import dataclass, fields
from typing import Literal, get_args

from tramontane.errors import ConfigError

SafetyPolicy = Literal["off", "request", "always"]
_MAY_BE_ZERO = {"port", "shutdown_timeout"}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Raises ConfigError: the server is open to others only with a key.

    Times are in seconds, `rate_limit` in requests per minute and key, `max_concurrency` in requests
    at a time and key. `price_per_hour` is what the machine costs, in dollars.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    served_model_names: tuple[str, ...] = ()
    safe_prompt: SafetyPolicy = "request"
    rate_limit: int | None = None
    max_concurrency: int | None = None
    price_per_hour: float | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    enable_return_routed_experts: bool = False
    shutdown_timeout: float = 30.0
    max_body_bytes: int = 4 * 1024 * 1024
    max_header_bytes: int = 32 * 1024
    max_headers: int = 100
    max_connections: int = 2048
    read_timeout: float = 20.0  # for all headers, and again for the whole body
    write_timeout: float = 60.0  # for a client that does not read
    keep_alive_timeout: float = 30.0  # between two requests of a connection
    heartbeat: float = 15.0  # a comment in a stream that is silent for so long

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.port > 65535:
            raise ConfigError(f"--port is {self.port}; it must be at most 65535")
        if self.safe_prompt not in get_args(SafetyPolicy):
            raise ConfigError(
                f"--safe-prompt is {self.safe_prompt!r}; it must be off, request or always"
            )
        for key in self.api_keys:
            _check_key(key)
        if not self.api_keys and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} opens the server to other machines, and there is no API key: "
                f"give --api-key, --api-key-file or TRAMONTANE_API_KEY, or bind 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that binds `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_keys(text: str) -> tuple[str, ...]:
    """The keys of a file: one a line; empty lines and those that begin with # are skipped."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _require_positive(settings: ServerSettings) -> None:
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        low = 0 if field.name in _MAY_BE_ZERO else 1e-9
        if not low <= value < float("inf"):
            flag = "--" + field.name.replace("_", "-")
            above = "at least 0" if field.name in _MAY_BE_ZERO else "above 0"
            raise ConfigError(f"{flag} is {value}; it must be {above}, and finite")


def _check_key(key: str) -> None:
    """A key travels in a header; the message does not repeat it."""
    if not key or not all(33 <= ord(character) <= 126 for character in key):
        raise ConfigError(
            "an API key is empty, or has a space or a character beyond ASCII: use letters, digits "
            "and -_.~+/=, for example the output of: openssl rand -hex 24"
        )
