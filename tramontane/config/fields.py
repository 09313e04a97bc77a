"""What the configurations share: building one strictly from plain values, and checking numbers."""

import math
from dataclasses import fields
from typing import Any

from tramontane.errors import ConfigError


def build_config(cls: type[Any], values: dict[str, Any], *, where: str) -> Any:
    """Make the dataclass `cls` from `values`; an unknown or a missing key is a ConfigError."""
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"unknown keys in {where}: {unknown}; known are {sorted(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}".replace(f"{cls.__name__}.__init__() ", "")) from None


def divide_heads(dim: Any, n_heads: Any) -> int:
    """The size of a head where it is not given. Raises ConfigError unless both are whole."""
    for name, value in (("dim", dim), ("n_heads", n_heads)):
        if type(value) is not int or value < 1:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number above zero")
    return int(dim // n_heads)


def to_float(value: Any, name: str) -> float:
    """A number of a JSON file as a float. Raises ConfigError if it is none, or too large."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise OverflowError
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name} is {value!r}; it must be a number") from None


def require_positive(config: Any, *names: str) -> None:
    """Raise ConfigError unless each named field is finite, above zero, and whole if not a float."""
    declared = {field.name: field.type for field in fields(config)}
    for name in names:
        value = getattr(config, name)
        kind, noun = (int | float, "finite") if declared[name] is float else (int, "whole")
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value!r}; it must be a {noun} number above zero")


def require_within(config: Any, name: str, low: float, high: float = math.inf) -> None:
    """Raise ConfigError unless a field is a number from `low` to `high`, both included."""
    value = getattr(config, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value == math.inf:
        top = "" if high == math.inf else f" to {high:g}"
        raise ConfigError(f"{name} is {value!r}; it must be a number from {low:g}{top}")
