"""What a request asks of the sampler: defaults, ranges and the errors of values outside them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from tramontane.engine.constraint import Constraint
from tramontane.errors import RequestError

MAX_STOPS = 16
MAX_STOP_LENGTH = 256  # characters
MAX_LISTED_IDS = 1024  # of logit_bias, allowed_token_ids, stop_token_ids


class _Range(NamedTuple):
    kind: type[int] | type[float]
    low: float
    high: float
    text: str
    is_optional: bool = False

    def contains(self, value: object) -> bool:
        if value is None:
            return self.is_optional
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.kind is int and not isinstance(value, int):
            return False
        return math.isfinite(value) and self.low <= value <= self.high


_RANGES = {
    "max_tokens": _Range(int, 0, 1_000_000, "a whole number from 0 to 1000000"),
    "min_tokens": _Range(int, 0, 1_000_000, "a whole number from 0 to 1000000"),
    "temperature": _Range(float, 0, 100, "a number from 0 (always the likeliest token) to 100"),
    "top_k": _Range(int, -1, 1_000_000, "a whole number from 0 (off; so is -1) to 1000000"),
    "top_p": _Range(float, math.ulp(0.0), 1, "a number above 0, up to 1 (off)"),
    "min_p": _Range(float, 0, 1, "a number from 0 (off) to 1"),
    "repetition_penalty": _Range(float, 0.01, 100, "a number from 0.01 to 100; 1 is off"),
    "presence_penalty": _Range(float, -2, 2, "a number from -2 to 2; 0 is off"),
    "frequency_penalty": _Range(float, -2, 2, "a number from -2 to 2; 0 is off"),
    "seed": _Range(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1, or none", True),
    "n": _Range(int, 1, 128, "a whole number from 1 to 128"),
    "logprobs": _Range(int, 0, 20, "a whole number from 0 to 20, or none", True),
    "prompt_logprobs": _Range(int, 0, 20, "a whole number from 0 to 20, or none", True),
    "experts_per_token": _Range(int, 1, 1024, "a whole number from 1, or none", True),
}
_STOP_TEXT = f"up to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters"
_IDS_TEXT = f"up to {MAX_LISTED_IDS} token ids"
_BIAS_TEXT = f"a mapping of up to {MAX_LISTED_IDS} token ids to numbers from -100 to 100"

# What a person may set by name and text.
PARAM_NAMES = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "seed", "stop", "experts_per_token",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop. The defaults suit a small model that tells stories.

    Raises RequestError, naming field, value and range. Applied in this order: constraint, allowed
    ids, bias, penalties, temperature, top-k, top-p, min-p. Penalties are transformers' (repetition,
    of prompt and answer) and OpenAI's (presence and frequency, of the answer). `stop` also takes a
    single text or a list. `n` answers draw from `seed`, `seed + 1`, ... `logprobs` asks for the
    chances of so many likeliest tokens beside the chosen one's, before any of the above.
    `experts_per_token` sets how many experts each token of this request runs through; none: the
    model's own number.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # whether a stop text belongs to the answer
    min_tokens: int = 0  # no answer ends by itself before
    ignore_eos: bool = False
    n: int = 1
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    allowed_token_ids: tuple[int, ...] = ()  # none: all
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    experts_per_token: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if not allowed.contains(value):
                raise RequestError(f"{name} is {value!r}; it must be {allowed.text}")
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, "
                f"which is {self.max_tokens}"
            )
        object.__setattr__(self, "stop", _check_stop(self.stop))
        object.__setattr__(self, "logit_bias", _check_bias(self.logit_bias))
        for name in ("stop_token_ids", "allowed_token_ids"):
            object.__setattr__(self, name, _check_ids(name, getattr(self, name)))

    def with_setting(self, name: str, text: str) -> "SamplingParams":
        """A copy with one of PARAM_NAMES read from text, as a person types it: ("top-p", "0.9").

        "none" empties what may be empty. Raises RequestError on an unknown name or a bad value.
        """
        field = name.replace("-", "_")
        if field not in PARAM_NAMES:
            raise RequestError(f"there is no setting {name!r}; there are {', '.join(PARAM_NAMES)}")
        return replace(self, **{field: _parse_value(field, text)})

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < GREEDY_BELOW


GREEDY_BELOW = 1e-5  # at a lower temperature only scores this close to the best have a chance


def _check_stop(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or len(stops) > MAX_STOPS:
        raise RequestError(f"stop is {stop!r}; it must be {_STOP_TEXT}")
    for text in stops:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise RequestError(f"stop holds {text!r}; it must be {_STOP_TEXT}")
    return tuple(stops)


def _check_ids(name: str, ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, Sequence) or isinstance(ids, str) or len(ids) > MAX_LISTED_IDS:
        raise RequestError(f"{name} is {_show(ids)}; it must be {_IDS_TEXT}")
    for token_id in ids:
        if not _is_id(token_id):
            raise RequestError(f"{name} holds {token_id!r}; it must be {_IDS_TEXT}")
    return tuple(ids)


def _check_bias(bias: Any) -> Mapping[int, float]:
    if not isinstance(bias, Mapping) or len(bias) > MAX_LISTED_IDS:
        raise RequestError(f"logit_bias is {_show(bias)}; it must be {_BIAS_TEXT}")
    allowed = _Range(float, -100, 100, "")
    for token_id, value in bias.items():
        if not _is_id(token_id) or not allowed.contains(value):
            raise RequestError(f"logit_bias holds {token_id!r}: {value!r}; it must be {_BIAS_TEXT}")
    return MappingProxyType(dict(bias))


def _show(value: object) -> str:
    """A value in a message, which need not hold a million of them."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _parse_value(field: str, text: str) -> Any:
    if field in ("seed", "stop", "experts_per_token") and text.lower() == "none":
        return () if field == "stop" else None
    if field == "stop":
        return (text.replace("\\n", "\n"),)
    try:
        return _RANGES[field].kind(text)
    except ValueError:
        raise RequestError(f"{field} is {text!r}; it must be {_RANGES[field].text}") from None
