"""What a request asks of the sampler: defaults, ranges and the errors of values outside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from tramontane.errors import RequestError

MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters


class _Range(NamedTuple):
    kind: type[int] | type[float]
    low: float
    high: float
    text: str

    def contains(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.kind is int and not isinstance(value, int):
            return False
        return math.isfinite(value) and self.low <= value <= self.high


_RANGES = {
    "max_tokens": _Range(int, 1, 1_000_000, "a whole number from 1 to 1000000"),
    "temperature": _Range(float, 0, 100, "a number from 0 (always the likeliest token) to 100"),
    "top_k": _Range(int, -1, 1_000_000, "a whole number from 0 (off; so is -1) to 1000000"),
    "top_p": _Range(float, math.ulp(0.0), 1, "a number above 0, up to 1 (off)"),
    "min_p": _Range(float, 0, 1, "a number from 0 (off) to 1"),
    "repetition_penalty": _Range(float, 0.01, 100, "a number from 0.01 to 100; 1 is off"),
    "seed": _Range(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1, or none"),
}
_STOP_TEXT = f"up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. The defaults suit a small model that tells stories.

    Raises RequestError, naming field, value and range. The filters apply in the order penalty,
    temperature, top-k, top-p, min-p, as in transformers. `stop` also takes a single text or a list.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if not (allowed.contains(value) or (name == "seed" and value is None)):
                raise RequestError(f"{name} is {value!r}; it must be {allowed.text}")
        object.__setattr__(self, "stop", _check_stop(self.stop))

    def with_setting(self, name: str, text: str) -> "SamplingParams":
        """A copy with one field read from text, as a person types it: ("top-p", "0.9").

        "none" empties `seed` and `stop`. Raises RequestError on an unknown name or a bad value.
        """
        field = name.replace("-", "_")
        if field not in PARAM_NAMES:
            raise RequestError(f"there is no setting {name!r}; there are {', '.join(PARAM_NAMES)}")
        return replace(self, **{field: _parse_value(field, text)})


PARAM_NAMES = tuple(field.name for field in fields(SamplingParams))


def _check_stop(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or len(stops) > MAX_STOPS:
        raise RequestError(f"stop is {stop!r}; it must be {_STOP_TEXT}")
    for text in stops:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise RequestError(f"stop holds {text!r}; it must be {_STOP_TEXT}")
    return tuple(stops)


def _parse_value(field: str, text: str) -> Any:
    if field in ("seed", "stop") and text.lower() == "none":
        return () if field == "stop" else None
    if field == "stop":
        return (text.replace("\\n", "\n"),)
    try:
        return _RANGES[field].kind(text)
    except ValueError:
        raise RequestError(f"{field} is {text!r}; it must be {_RANGES[field].text}") from None
