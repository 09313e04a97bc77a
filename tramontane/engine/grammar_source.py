"""What a constraint's source says, checked and put into the words of llguidance."""

import json
from typing import Any

from tramontane.engine.constraint import Constraint
from tramontane.errors import RequestError

# Between the parts of a JSON answer there is at most the one space that Python's json.dumps writes.
# With any white space allowed a small model never finishes: it goes on with spaces and line ends.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?",
           "lenient": False}  # fmt: skip


def describe_grammar(constraint: Constraint) -> dict[str, Any]:
    """What grammar_worker.py is to compile. Raises RequestError, naming the place in the source."""
    kind, source = constraint.kind, constraint.source
    _require_text(constraint)
    if kind == "json_object":
        return _describe_schema({"type": "object"})
    if kind == "json_schema":
        return _describe_schema(_parse_schema(source))
    if kind == "regex":
        return {"regex": source}
    if kind == "choice":
        return {"grammar": {"lark_grammar": f"start: CHOICE\nCHOICE: {_join_choices(source)}"}}
    return {"grammar": {"lark_grammar": source}}


def _describe_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"grammar": {"json_schema": {**schema, "x-guidance": _LAYOUT}}}


def _parse_schema(source: str) -> dict[str, Any]:
    schema = _parse_json(source, "json_schema")
    if not isinstance(schema, dict):
        raise RequestError(
            f"the json_schema is a JSON {type(schema).__name__}; it must be an object such as "
            f'{{"type": "object"}}'
        )
    return schema


def _join_choices(source: str) -> str:
    choices = _parse_json(source, "choice")
    if not isinstance(choices, list) or not choices:
        raise RequestError("the choice must be a JSON list of one text or more")
    for number, choice in enumerate(choices):
        if not isinstance(choice, str) or not choice:
            raise RequestError(f"choice {number} is {choice!r}; it must be a text, and not empty")
    return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def _parse_json(source: str, kind: str) -> Any:
    try:
        return json.loads(source, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: json's own, and numbers too long
        raise RequestError(f"the {kind} is not JSON: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _require_text(constraint: Constraint) -> None:
    try:
        constraint.source.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"character {error.start} of the {constraint.kind} is a lone surrogate, which has no "
            f"UTF-8 form: remove it"
        ) from None
