"""JSON as bytes, for answers and for the events of a stream."""

import json
from typing import Any

from fastapi.responses import Response

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def dump_json(value: Any) -> bytes:
    """Compact UTF-8. A lone surrogate, which a request's text may hold, becomes its escape."""
    return _ENCODER.encode(value).encode("utf-8", errors="backslashreplace")


class JsonResponse(Response):
    """A body of JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See `dump_json`."""
        return dump_json(content)
