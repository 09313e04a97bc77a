"""Server-sent events as a client reads them."""

import json
from typing import Any

import httpx2


def read_events(response: httpx2.Response) -> tuple[list[dict[str, Any]], str | None]:
    """The events that are JSON, and the last one that is not."""
    assert response.status_code == 200, response.text
    events, last = [], None
    for block in response.text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        data = block.removeprefix("data: ")
        if data == "[DONE]":
            last = data
        else:
            events.append(json.loads(data))
    return events, last
