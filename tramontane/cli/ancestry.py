"""`tramontane ancestry`: whether one model was made from another."""

import json
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:
    from tramontane.eval.ancestry import Ancestry, ModelWeights


def ancestry(
    a: str,
    b: str,
    /,
    *,
    units: int = 128,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Find out whether one of two models was made from the other, by their weights.

    Hidden units of each network are looked for among those of the other model in the same layer, in
    whatever order: copies are found after training too. Who came first the weights do not say.
    Example: tramontane ancestry mistralai/Mistral-7B-v0.1 mistralai/Mixtral-8x7B-v0.1

    Parameters
    ----------
    a
        A folder or file in any layout, or the id of a model that has been pulled; dense or sparse.
    b
        Another.
    units
        Hidden units of each network that are looked for, a random sample.
    as_json
        Print JSON, with each expert.
    """
    from tramontane.errors import RequestError
    from tramontane.eval.ancestry import compare_models

    if units < 1:
        raise RequestError(f"--units is {units}; it must be above zero")
    result = compare_models(_open(a), _open(b), num_units=units)
    if as_json:
        print(json.dumps(asdict(result), indent=2))
        return
    _print_table(result)
    print(f"{result.verdict}: {result.reason}")


def _open(model: str) -> "ModelWeights":
    from tramontane.checkpoint.intake import open_checkpoint
    from tramontane.checkpoint.parameters import StoredParameters
    from tramontane.eval.ancestry import ModelWeights
    from tramontane.hub.cache import resolve_model

    checkpoint = open_checkpoint(resolve_model(model))
    checkpoint.require_unquantized("ancestry")
    return ModelWeights(StoredParameters(checkpoint.pairs), checkpoint.config)


def _print_table(result: "Ancestry") -> None:
    if not result.experts:
        return
    print(f"networks of {result.looked_for} in the other model; chance {result.chance:.3f}")
    print("layer  similarity: least  mean  in order  attention")
    for layer, attention in enumerate(result.attention):
        matches = [match for match in result.experts if match.layer == layer]
        values = [match.similarity for match in matches]
        order = fmean(match.in_order for match in matches)
        shown = "-" if attention is None else f"{attention:.3f}"
        print(f"{layer:>5}  {min(values):>17.3f}  {fmean(values):.3f}  {order:>7.0%}  {shown:>9}")
    print(f"embeddings {'-' if result.embeddings is None else format(result.embeddings, '.3f')}")
