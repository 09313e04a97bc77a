"""`tramontane estimate`: how much memory a model takes, before it is there."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from tramontane.errors import RequestError

if TYPE_CHECKING:
    from tramontane.config import ModelConfig


def estimate(
    model: str,
    /,
    *,
    quant: Literal["none", "int8", "int4"] = "none",
    context: int | None = None,
    batch: int = 1,
    ram: float | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Estimate the memory that a model takes, from its configuration alone.

    Nothing is loaded; of a model on the hub, the configuration alone is fetched.

    Parameters
    ----------
    model
        A preset such as mixtral-8x7b, a folder or file, or an id of the Hugging Face hub.
    quant
        Weights packed in 8 or 4 bits in groups of 32; router, norms, embeddings and head are not.
    context
        Tokens of a sequence, prompt and answer together; by default the longest.
    batch
        Sequences at a time.
    ram
        Memory to fit into, in GiB; by default what is free on this machine.
    as_json
        Print JSON instead of a table.
    """
    from tramontane.cli.machine import read_memory
    from tramontane.engine.estimate import estimate_memory, find_longest_context

    config = _read_config(model)
    parts = estimate_memory(config, quant=quant, context=context, batch=batch)
    available = round(ram * 2**30) if ram is not None else _count_free(read_memory())
    longest = find_longest_context(config, quant=quant, batch=batch, available=available)
    values = {
        "weights": parts.weights, "kv_cache": parts.kv_cache, "scratch": parts.scratch,
        "total": parts.total, "available": available,
    }  # fmt: skip
    fits = parts.total <= available
    verdict = {"fits": fits, "longest_context_that_fits": longest}
    if as_json:
        print(json.dumps({"model": model, "quant": quant, **values, **verdict}, indent=2))
        return
    kind = "bf16" if quant == "none" else quant
    print(f"{model} in {kind}, {batch} x {context or config.max_seq_len:,} tokens")
    for name, size in values.items():
        print(f"{name:<10} {size:>18,} bytes {size / 2**30:>9.2f} GiB")
    print(_explain(fits=fits, longest=longest, quant=quant))


def _read_config(model: str) -> "ModelConfig":
    """That of a preset, of what lies at a path or in the cache, or of the hub."""
    from tramontane.checkpoint.summary import read_config_alone, summarize
    from tramontane.config import PRESETS
    from tramontane.hub.cache import find_snapshots, split_model_id
    from tramontane.hub.pull import fetch_config

    split = split_model_id(model)
    if model in PRESETS or split is None or Path(model).exists():
        return summarize(model).config
    if snapshots := find_snapshots(split[0]):
        return read_config_alone(snapshots[0])
    return read_config_alone(fetch_config(split[0]))


def _count_free(memory: dict[str, int | None]) -> int:
    """What this process may still use."""
    free = memory["available_bytes"]
    if free is None:
        raise RequestError("this system does not say how much memory is free; give --ram in GiB")
    return min(free, memory["limit_bytes"] or free)


def _explain(*, fits: bool, longest: int, quant: str) -> str:
    """What follows from the figures."""
    if fits:
        return f"it fits; with up to {longest:,} tokens"
    if longest:
        return f"it does not fit; with --context {longest} it does"
    smaller = {"none": "try --quant int8 or int4", "int8": "try --quant int4"}
    return f"it does not fit; {smaller.get(quant, 'this takes a larger machine')}"
