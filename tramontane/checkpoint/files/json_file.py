"""JSON from a checkpoint: an object in which no key is there twice, or an error that says where."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tramontane.checkpoint.files.untrusted import shorten
from tramontane.errors import CheckpointError

MAX_BYTES = 64 * 2**20  # of a configuration or an index; those of Mixtral 8x22B have 200 KB


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises CheckpointError if there is none, or too much."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}; incomplete download?")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; more than {MAX_BYTES:,} are no JSON")
    return parse_json(path.read_bytes(), where=str(path))


def parse_json(encoded: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object in which no key is there twice; CheckpointError says what is wrong `where`."""
    try:
        values = json.loads(encoded.decode(), object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {error}; incomplete download?") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is a {type(values).__name__}, not a JSON object")
    return values


def _refuse_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{shorten(key)} is there twice")
        values[key] = value
    return values
