"""`tramontane list`: the models on this machine."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter


def list_models(*, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False) -> None:
    """List the models in the hub's cache that hold weights we read, and the bundled one.

    Parameters
    ----------
    as_json
        Print a JSON list instead of text.
    """
    import json

    from tramontane.cli.notices import say
    from tramontane.hub import cache

    models, warnings = cache.list_models()
    rows = [*_describe_bundled_model(), *map(_describe, models)]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        print(_format_table(rows, cache.get_cache_folder()))
    for warning in warnings:
        say(f"damaged: {warning}")


def _describe(model: Any) -> dict[str, Any]:
    used = datetime.fromtimestamp(model.last_used, tz=UTC)
    return {
        "id": model.id,
        "is_bundled": False,
        "formats": list(model.formats),
        "bytes": model.size_bytes,
        "last_used": used.isoformat(timespec="seconds"),
        "path": str(model.path),
    }


def _describe_bundled_model() -> list[dict[str, Any]]:
    from tramontane.engine.bundled import BUNDLED_MODEL, is_bundled_model_there

    if not is_bundled_model_there():
        return []
    return [
        {
            "id": "(bundled)",
            "is_bundled": True,
            "formats": ["hf"],
            "bytes": sum(p.stat().st_size for p in BUNDLED_MODEL.iterdir() if p.is_file()),
            "last_used": None,
            "path": str(BUNDLED_MODEL),
        }
    ]


def _format_table(rows: list[dict[str, Any]], folder: Path) -> str:
    from tramontane.cli.machine import format_bytes

    width = max((len(row["id"]) for row in rows), default=5)
    lines = [f"{'model':<{width}}  {'format':<10} {'size':>10}  last used"]
    for row in rows:
        used = (row["last_used"] or "-")[:10]
        formats, size = ",".join(row["formats"]), format_bytes(row["bytes"])
        lines.append(f"{row['id']:<{width}}  {formats:<10} {size:>10}  {used}")
    return "\n".join([*lines, f"cache: {folder}"])
