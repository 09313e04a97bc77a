"""`tramontane show`: what a model is, without reading its weights."""

import json
from typing import Annotated, Any

from cyclopts import Parameter


def show(
    model: str,
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Print what a model is: configuration, parameters, bytes, and what was found where.

    Weights are not read. Exit code 1 if the model could not be loaded as it is.

    Parameters
    ----------
    model
        A folder or file in any layout, the id of a model that has been pulled, a preset such as
        mixtral-8x7b, or a text file that lists tensors: a name and a shape in each line, or JSON.
    as_json
        Print JSON instead of a table.
    """
    from tramontane.checkpoint.summary import summarize
    from tramontane.errors import CheckpointError
    from tramontane.hub.cache import resolve_model

    summary = summarize(str(resolve_model(model)))
    values = summary.to_dict()
    if as_json:
        print(json.dumps(values, indent=2))
    else:
        for name, value in _list_rows(values):
            print(f"{name:<20} {value}")
    if summary.problems:
        raise CheckpointError("; ".join(summary.problems))


def _list_rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    """The table's rows."""
    config, moe = values["config"], values["config"]["moe"]
    rows = [
        ("model", values["name"]),
        ("layout", values["layout"]),
        ("parameters", f"{values['parameters']:,}"),
        ("active per token", f"{values['active_parameters']:,}"),
        ("keys and values", f"{values['kv_bytes_per_token']:,} bytes per token in 16 bits"),
    ]
    rows += [
        (f"bytes in {encoding}", f"{size:,}")
        for encoding, size in values["bytes_by_encoding"].items()
    ]
    rows += [(what, where) for what, where in values["found"].items()]
    rows += [(key, str(value)) for key, value in config.items() if key != "moe"]
    if moe:
        rows += [(key, str(value)) for key, value in moe.items()]
    return rows + [("assumed", what) for what in values["assumed"]]
