"""The one place where an error gets its HTTP status and its body.

{"error": {"message", "type", "param", "code"}, "object": "error", "message"}: OpenAI's shape, and
the two fields that Mistral's first clients read.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NamedTuple

from tramontane.errors import (
    CapacityError,
    ContextError,
    EngineError,
    OverloadError,
    RequestError,
    TokenizerError,
    TramontaneError,
    UnavailableError,
)
from tramontane.server.json_text import JsonResponse

_log = logging.getLogger("tramontane.server")
MAX_MESSAGE = 1000  # characters: a message may quote what was sent
_RETRIED = (408, 429, 503)  # what may be answered the next time
LOADING = "Loading model"  # llama-server's words; clients wait on them


class ApiError(Exception):
    """An answer that is an error. `headers` go with it."""

    def __init__(
        self, status: int, message: str, *, type: str, code: str | int | None = None,
        param: str | None = None, headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.type, self.code, self.param = status, type, code, param
        self.message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "..."
        self.headers = dict(headers or {})

    def to_body(self) -> dict[str, Any]:
        """The body, also of an event in a stream."""
        error = {
            "message": self.message, "type": self.type, "param": self.param, "code": self.code,
        }  # fmt: skip
        return {"error": error, "object": "error", "message": self.message}

    def to_response(self) -> JsonResponse:
        """The whole answer. OpenAI's client would send again whatever is 500 or more."""
        should_retry = "true" if self.status in _RETRIED else "false"
        headers = {"x-should-retry": should_retry, **self.headers}
        return JsonResponse(self.to_body(), self.status, headers=headers)


class _Kind(NamedTuple):
    error: type[Exception]
    status: int
    type: str
    code: str | int | None
    retry_after: int | None = None  # seconds


# The first that fits; the order is from the special to the general.
_KINDS = (
    _Kind(ContextError, 400, "invalid_request_error", "context_length_exceeded"),
    _Kind(RequestError, 400, "invalid_request_error", None),
    _Kind(TokenizerError, 400, "invalid_request_error", "not_encodable"),
    _Kind(OverloadError, 429, "rate_limit_error", "overloaded", 1),
    _Kind(CapacityError, 503, "unavailable_error", "out_of_memory", 5),
    _Kind(UnavailableError, 503, "unavailable_error", 503, 5),
    _Kind(EngineError, 500, "server_error", "engine_error"),
)
_FIELD = re.compile(r"[a-z][a-z_]+(?= (?:is|holds) )")


def invalid(message: str, param: str | None, *, code: str | None = None) -> ApiError:
    """A request that can never be answered as it is."""
    return ApiError(400, message, type="invalid_request_error", code=code, param=param)


def unsupported(param: str, remedy: str) -> ApiError:
    """A field that the interface knows and this server does not serve."""
    return invalid(f"{param} is not supported here: {remedy}", param, code="unsupported_field")


def limited(message: str, *, code: str, retry_after: float) -> ApiError:
    """Too much at once; `retry_after` in seconds."""
    return ApiError(
        429, message, type="rate_limit_error", code=code, headers=_retry_headers(retry_after)
    )


def never_fits(error: CapacityError, param: str) -> ApiError:
    """The engine refuses what no waiting makes possible."""
    return invalid(str(error), param, code="request_too_large")


def map_error(error: Exception, *, param: str | None = None) -> ApiError:
    """Any error as an answer; `param` is the field at fault where the message names none.

    What nobody foresaw is a 500 that says nothing of the inside, and goes to the log.
    """
    if isinstance(error, ApiError):
        return error
    for kind in _KINDS:
        if isinstance(error, kind.error):
            named = _FIELD.match(str(error))
            return ApiError(
                kind.status, str(error), type=kind.type, code=kind.code,
                param=(named.group() if named else param) if kind.status == 400 else None,
                headers=_retry_headers(kind.retry_after) if kind.retry_after else None,
            )  # fmt: skip
    _log.error("a request failed", exc_info=error)
    return ApiError(
        500, "the server failed; the log says where", type="server_error", code="internal_error"
    )


@contextmanager
def blame(param: str) -> Iterator[None]:
    """Errors of ours within are the client's, and of this field, unless they name another."""
    try:
        yield
    except TramontaneError as error:
        raise map_error(error, param=param) from error


def describe_status(
    status: int, detail: object, *, headers: Mapping[str, str] | None = None
) -> ApiError:
    """An error that the framework raised: an unknown path, a wrong method, an unreadable body."""
    texts = {
        404: "there is no such path",
        405: "this path has no such method; the Allow header lists those it has",
    }
    phrase = HTTPStatus(status).phrase
    text = texts.get(status) or (detail if isinstance(detail, str) and detail else phrase)
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = phrase.lower().replace(" ", "_")
    return ApiError(status, text, type=kind, code=code, headers=headers)


def _retry_headers(seconds: float) -> dict[str, str]:
    """In whole seconds for everyone, in milliseconds for OpenAI's client."""
    whole = max(1, -int(-seconds // 1))
    return {"retry-after": str(whole), "retry-after-ms": str(max(1, round(seconds * 1000)))}
