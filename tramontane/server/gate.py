"""The gate that every request passes: name, origin, key, limits, body; and a last catch.

All of it is decided here and nowhere else, so that no route can be left out. What is open without
a key is a list of exact paths; anything else, known or not, asks for one.
"""

import logging
import time
import uuid
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tramontane.server.access import Headers, HostPolicy, KeyRing, get_all
from tramontane.server.body import ClientLeft, read_body, replay
from tramontane.server.errors import ApiError, describe_status, map_error
from tramontane.server.limits import KeyLimits
from tramontane.server.settings import ServerSettings

_log = logging.getLogger("tramontane.server")
_WITHOUT_BODY = ("GET", "HEAD")
_MAX_LABEL = 128  # characters of a client's own request id that are kept
_COMMON_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Gate:
    """ASGI middleware around the whole application. `open_paths` may be read without a key.

    Hands on in scope["state"]: `tenant`, `request_id`, and `started_at` (perf_counter).
    """

    def __init__(
        self, app: ASGIApp, *, settings: ServerSettings, limits: KeyLimits,
        open_paths: Collection[str],
    ) -> None:  # fmt: skip
        self._app, self._settings, self._limits = app, settings, limits
        self._open_paths = frozenset(open_paths)
        self._keys = KeyRing(settings.api_keys)
        self._hosts = HostPolicy(
            bound=settings.host, hosts=settings.allowed_hosts, origins=settings.allowed_origins
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _Passage(scope, send).run(self, receive)

    async def admit(self, scope: Scope, receive: Receive, send: "_Passage") -> None:
        """Check, then pass on. Raises ApiError, ClientLeft, and whatever a route lets through."""
        headers: Headers = scope["headers"]
        if len(headers) > self._settings.max_headers:
            raise describe_status(
                431, f"{len(headers)} headers; at most {self._settings.max_headers} are read"
            )
        send.origin = self._hosts.check(headers)
        if send.origin and _is_preflight(scope):
            return await _allow(send, headers)
        is_open = scope["path"] in self._open_paths and scope["method"] in _WITHOUT_BODY
        tenant = "" if is_open else self._keys.find_tenant(headers)
        scope.setdefault("state", {}).update(
            tenant=tenant, request_id=send.request_id, started_at=send.started_at
        )
        if scope["method"] in _WITHOUT_BODY:
            return await self._app(scope, receive, send)
        with self._limits.admit(tenant):
            body = await read_body(
                receive, headers, max_bytes=self._settings.max_body_bytes,
                seconds=self._settings.read_timeout,
            )  # fmt: skip
            return await self._app(scope, replay(body, receive), send)


class _Passage:
    """One request on its way; as `send` it adds the headers that every answer has."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._status: int | None = None
        self.origin: str | None = None
        self.started_at = time.perf_counter()
        self.request_id = _read_label(scope["headers"]) or uuid.uuid4().hex

    async def run(self, gate: Gate, receive: Receive) -> None:
        try:
            await gate.admit(self._scope, receive, self)
        except ClientLeft:
            self._status = self._status or 499
        except ApiError as error:
            await self._answer(error, receive)
        except Exception as error:  # whatever a route did not foresee must not end the connection
            _log.error("%s: failed", self.request_id)
            await self._answer(map_error(error), receive)
        self._write_log()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", []), *self._list_headers()]
        await self._send(message)

    async def _answer(self, error: ApiError, receive: Receive) -> None:
        """An error instead of an answer; one that has begun is cut, which the client sees."""
        if self._status is None:
            await error.to_response()(self._scope, receive, self)

    def _list_headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", self.request_id.encode()), *_COMMON_HEADERS]
        if self.origin:
            exposed = b"x-request-id, x-tramontane-ignored-fields, x-tramontane-safe-prompt"
            headers += [
                (b"access-control-allow-origin", self.origin.encode("latin-1")),
                (b"access-control-expose-headers", exposed), (b"vary", b"Origin"),
            ]  # fmt: skip
        return headers

    def _write_log(self) -> None:
        """One line a request; without the query, where someone may have put a key."""
        _log.info(
            "%s %s %s %s %.0f ms", self.request_id, self._scope["method"],
            ascii(self._scope["path"])[1:-1], self._status,
            1000 * (time.perf_counter() - self.started_at),
        )  # fmt: skip


def _read_label(headers: Headers) -> str:
    """The client's name for its request, a label and nothing else; "" if there is none."""
    values = get_all(headers, b"x-request-id")
    text = values[0].decode("latin-1")[:_MAX_LABEL] if values else ""
    return "".join(c for c in text if c.isascii() and (c.isalnum() or c in "-_.:"))


def _is_preflight(scope: Scope) -> bool:
    """A browser asks, without a key, whether a page of another site may send a request."""
    asked = get_all(scope["headers"], b"access-control-request-method")
    return scope["method"] == "OPTIONS" and bool(asked)


async def _allow(send: Send, asked: Headers) -> None:
    wanted = get_all(asked, b"access-control-request-headers")
    headers = [
        (b"access-control-allow-methods", b"GET, POST"), (b"access-control-max-age", b"600"),
        (b"access-control-allow-headers", wanted[0] if wanted else b"authorization, content-type"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
