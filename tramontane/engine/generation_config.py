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


def load_generation_config(folder: Path, *, eos_id: int) -> GenerationConfig:
    """Read the file if there is one; `eos_id` ends answers where the file names no other id.

    `do_sample: false` means temperature 0. Keys that do not concern us have no effect. Raises
    ConfigError, naming the file, if it cannot be read or a value is out of range.
    """
    path = folder / FILE_NAME
    values = _read_object(path) if path.is_file() else {}
    overrides = {
        param: values[key] for key, param in _PARAM_OF_KEY.items() if values.get(key) is not None
    }
    if values.get("do_sample") is False:
        overrides["temperature"] = 0.0
    try:
        params = replace(SamplingParams(), **overrides)
    except RequestError as error:
        raise ConfigError(f"{path}: {error}") from None
    return GenerationConfig(params, overrides, _read_eos_ids(values, path, eos_id=eos_id))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no JSON object")
    return values


def _read_eos_ids(values: Mapping[str, Any], path: Path, *, eos_id: int) -> frozenset[int]:
    given = values.get("eos_token_id")
    if given is None:
        return frozenset({eos_id})
    ids = given if isinstance(given, list) else [given]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(
            f"{path}: eos_token_id is {given!r}; it must be a token id, or a list of them"
        )
    return frozenset(ids)
