"""`generation_config.json` of a model folder: the sampling defaults that its makers recommend."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tramontane.engine.sampling_params import SamplingParams
from tramontane.errors import ConfigError, RequestError

FILE_NAME = "generation_config.json"
_PARAM_OF_KEY = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
}


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling defaults, those of them that the file set, and the ids that end an answer."""

    params: SamplingParams
    overrides: Mapping[str, Any]
    eos_ids: frozenset[int]


def load_generation_config(path: Path | None, *, eos_ids: frozenset[int]) -> GenerationConfig:
    """Read the file if there is one; `eos_ids` end answers where the file names no others.

    `do_sample: false` means temperature 0. Keys that do not concern us have no effect. Raises
    ConfigError, naming the file, if it cannot be read or a value is out of range.
    """
    values = {} if path is None else _read_object(path)
    overrides = {
        param: values[key] for key, param in _PARAM_OF_KEY.items() if values.get(key) is not None
    }
    if values.get("do_sample") is False:
        overrides["temperature"] = 0.0
    try:
        params = replace(SamplingParams(), **overrides)
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from None
    given = read_token_ids(values, origin=str(path)).get("eos_token_id")
    if given is not None:
        eos_ids = frozenset(given if isinstance(given, list) else [given])
    return GenerationConfig(params, overrides, eos_ids)


def read_token_ids(values: Mapping[str, Any], *, origin: str) -> dict[str, int | list[int]]:
    """bos_token_id and eos_token_id, those that are there, of this file or of config.json.

    Raises ConfigError, naming `origin`, if one is no id, nor eos_token_id a list of them.
    """
    found = {
        key: values[key] for key in ("bos_token_id", "eos_token_id") if values.get(key) is not None
    }
    for key, value in found.items():
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise ConfigError(
                f"{origin}: {key} is {value!r}; it must be a token id, or a list of them"
            )
    return found


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no JSON object")
    return values
