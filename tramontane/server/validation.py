"""FastAPI's 422 as the 400 that OpenAI's clients know: one message, and the field by its path."""

from typing import Any, NamedTuple

from fastapi.exceptions import RequestValidationError

from tramontane.server.errors import ApiError, invalid

_MAX_SHOWN = 80  # characters of a value in a message


class _Finding(NamedTuple):
    """An error, the path to its field, and which of a field's types it is about."""

    detail: dict[str, Any]
    path: list[str | int]
    branch: tuple[Any, ...]

    @property
    def weight(self) -> tuple[bool, int, list[int]]:
        """A wrong value says more than a wrong type; then what was understood furthest."""
        is_about_value = not str(self.detail["type"]).endswith("_type")
        places = [part for part in self.path if isinstance(part, int)]
        return is_about_value, len(self.path), places


def describe_validation(error: RequestValidationError) -> ApiError:
    """The most telling of the errors. A field that may be of several types has one for each."""
    first_of: dict[tuple[Any, ...], _Finding] = {}
    for detail in error.errors():
        finding = _trace(detail, error.body)
        first_of.setdefault(finding.branch, finding)
    finding = max(first_of.values(), key=lambda finding: finding.weight)
    param = ".".join(map(str, finding.path)) or None
    return invalid(f"{param or 'the body'}: {_explain(finding.detail)}", param)


def _trace(detail: dict[str, Any], body: Any) -> _Finding:
    """Follow the location through the body; what does not lead through it names a type."""
    where, *parts = detail["loc"]
    if where != "body" or detail["type"] == "json_invalid":
        return _Finding(detail, [] if where == "body" else list(map(str, parts)), ())
    path: list[str | int] = []
    branch = []
    for number, part in enumerate(parts):
        is_missing = number == len(parts) - 1 and detail["type"] == "missing"
        if isinstance(body, dict) and (part in body or is_missing):
            path.append(part)
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            path.append(part)
            body = body[part]
        else:
            branch.append(part)
    return _Finding(detail, path, (*path[:1], *branch))


def _explain(detail: dict[str, Any]) -> str:
    kind, value = detail["type"], detail.get("input")
    if kind == "missing":
        return "the field is required"
    if kind == "json_invalid":
        return f"it is not JSON ({detail.get('ctx', {}).get('error')} at {detail['loc'][-1]})"
    if isinstance(value, bytes):
        return "send JSON, with the header Content-Type: application/json"
    return f"{detail['msg']}, not {_show(value)}"


def _show(value: Any) -> str:
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
