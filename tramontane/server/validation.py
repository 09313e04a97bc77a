"""FastAPI's 422 as the 400 that OpenAI's clients know: one message, and the field by its path."""

from typing import Any

from fastapi.exceptions import RequestValidationError

from tramontane.server.errors import ApiError, invalid

_MAX_SHOWN = 80  # characters of a value in a message


def describe_validation(error: RequestValidationError) -> ApiError:
    """The most telling of the errors: the one deepest in the request, the first of those."""
    details = error.errors()
    paths = [_find_path(detail, error.body) for detail in details]
    detail, path = max(
        zip(details, paths, strict=True), key=lambda pair: (len(pair[1]), _is_about_value(pair[0]))
    )
    param = ".".join(map(str, path)) or None
    return invalid(f"{param or 'the body'}: {_explain(detail)}", param)


def _find_path(detail: dict[str, Any], body: Any) -> list[str | int]:
    """The parts of the location that lead through the body; pydantic's include names of types."""
    where, *parts = detail["loc"]
    if where != "body" or detail["type"] == "json_invalid":
        return [] if where == "body" else list(map(str, parts))
    path: list[str | int] = []
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        if isinstance(body, dict) and (part in body or (is_last and detail["type"] == "missing")):
            path.append(part)
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            path.append(part)
            body = body[part]
    return path


def _explain(detail: dict[str, Any]) -> str:
    kind, value = detail["type"], detail.get("input")
    if kind == "missing":
        return "the field is required"
    if kind == "json_invalid":
        return f"it is not JSON ({detail.get('ctx', {}).get('error')} at {detail['loc'][-1]})"
    if isinstance(value, bytes):
        return "send JSON, with the header Content-Type: application/json"
    return f"{detail['msg']}, not {_show(value)}"


def _is_about_value(detail: dict[str, Any]) -> bool:
    """Of a field that may be of several types: the one whose type fits says more."""
    return not str(detail["type"]).endswith("_type")


def _show(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
