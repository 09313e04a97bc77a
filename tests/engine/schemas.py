"""JSON schemas by dice, of the keywords that people use, small enough to be answered soon."""

import random
from typing import Any

Schema = dict[str, Any]

_NAMES = ["name", "age", "is_open", "first name", 'a"b', "\u00e9t\u00e9", "items", "x"]
_PATTERNS = ["^[a-z]{2,5}$", "^(up|down)[0-9]$", "^#[0-9A-F]{3}$"]
_VALUES = ["red", "two words", "\u00e9", "", 0, -7, 2.5, True, None]


def build_schema(seed: int) -> Schema:
    """An object, or now and then something else; with definitions that refer to each other."""
    dice = random.Random(seed)
    schema = _build_object(dice, 2) if dice.random() < 0.8 else _build_any(dice, 2)
    if dice.random() < 0.3 and schema.get("type") == "object":
        schema["$defs"] = {"part": _build_scalar(dice)}
        schema["properties"]["part"] = {"$ref": "#/$defs/part"}
        schema["required"].append("part")
    return schema


def _build_any(dice: random.Random, depth: int) -> Schema:
    kinds = [_build_scalar, _build_scalar, _build_scalar]
    if depth:
        kinds += [lambda d: _build_object(d, depth - 1), lambda d: _build_array(d, depth - 1),
                  lambda d: {"anyOf": [_build_any(d, 0), _build_any(d, depth - 1)]}]  # fmt: skip
    return dice.choice(kinds)(dice)


def _build_object(dice: random.Random, depth: int) -> Schema:
    names = dice.sample(_NAMES, dice.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _build_any(dice, depth) for name in names},
        "required": [name for name in names if dice.random() < 0.7],
        "additionalProperties": False,
    }


def _build_array(dice: random.Random, depth: int) -> Schema:
    low = dice.randint(0, 2)
    schema: Schema = {"type": "array", "minItems": low, "maxItems": low + dice.randint(0, 2)}
    if dice.random() < 0.25:
        schema["prefixItems"] = [_build_scalar(dice)]
    return schema | {"items": _build_any(dice, depth)}


def _build_scalar(dice: random.Random) -> Schema:
    low = dice.randint(-50, 50)
    return dice.choice([
        {"type": "integer", "minimum": low, "maximum": low + dice.randint(0, 900)},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 90, "multipleOf": 3},
        {"type": "number", "minimum": 0, "maximum": 1},
        {"type": "string", "maxLength": dice.randint(1, 12)},
        {"type": "string", "minLength": 2, "maxLength": 6},
        {"type": "string", "pattern": dice.choice(_PATTERNS)},
        {"type": "string", "format": dice.choice(["date", "time", "ipv4", "uuid"])},
        {"type": "boolean"},
        {"type": ["null", "boolean"]},
        {"const": dice.choice(_VALUES)},
        {"enum": dice.sample(_VALUES, 3)},
    ])  # fmt: skip
