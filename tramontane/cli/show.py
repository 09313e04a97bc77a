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

    Weights are not read. Exit code 1 if the model could not be loaded as it is. Of a model of the
    hub that has not been pulled, the configuration alone is fetched (HF_TOKEN opens gated ones).
    Example: tramontane show mistralai/Mixtral-8x7B-v0.1

    Parameters
    ----------
    model
        A folder or file in any layout, an id of the Hugging Face hub, a configuration alone, a
        preset such as mixtral-8x7b, or a text file that lists tensors: names and shapes as they
        are printed, one in each line, or JSON.
    as_json
        Print JSON instead of a table.
    """
    from tramontane.cli.model_summary import find_summary
    from tramontane.errors import CheckpointError

    summary = find_summary(model)
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
        ("loads as", values["dtype"]),
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
    if values["bits_per_weight"]:
        rows.insert(4, ("bits per weight", f"{values['bits_per_weight']:.2f}"))
    rows += [("assumed", what) for what in values["assumed"]]
    return rows + [("doubtful", what) for what in values["doubts"]]
