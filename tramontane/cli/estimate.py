"""`tramontane estimate`: how much memory a model takes, before it is there."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from tramontane.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from tramontane.config import ModelConfig

Quant = Literal["none", "int8", "int4"]
_QUANTS: tuple[Quant, ...] = ("none", "int8", "int4")  # from large to small
_KINDS = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}


def estimate(
    model: str,
    /,
    *,
    quant: Quant = "none",
    context: int | None = None,
    batch: int = 1,
    ram: float | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Estimate the memory that a model takes, from its configuration and headers alone.

    Nothing is loaded; of a model on the hub that has not been pulled, the configuration alone is
    fetched (HF_TOKEN opens gated ones). Weights and cache are counted in the type that the model
    loads as. Example: tramontane estimate mixtral-8x7b --quant int4 --context 8192 --ram 32

    Parameters
    ----------
    model
        A preset such as mixtral-8x7b, a folder, file or configuration, or an id of the Hugging
        Face hub; org/name:Q4_0 is a GGUF file that has been pulled.
    quant
        Experts and attention in 8 or 4 bits, with a scale for each 32: 8.5 or 4.5 bits per weight.
        Router, norms, embeddings and head stay as they are.
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
    from tramontane.cli.model_summary import find_summary
    from tramontane.engine.estimate import estimate_memory

    summary = find_summary(model)
    if summary.is_quantized and quant != "none":
        raise RequestError(f"{model} is quantised already; leave --quant out")
    available = _parse_ram(ram) if ram is not None else _count_free(read_memory())
    config, size = summary.config, summary.dtype.itemsize
    parts = estimate_memory(config, quant=quant, bytes_per_value=size, context=context, batch=batch)
    extra = 0
    if quant == "none" and summary.weight_bytes is not None:  # packed weights, if some are
        extra = summary.weight_bytes - parts.weights
        parts = replace(parts, weights=summary.weight_bytes)
    search = _Search(config=config, bytes_per_value=size, batch=batch, available=available)
    longest = search.find_longest(quant, extra=extra)
    values = {
        "weights": parts.weights, "kv_cache": parts.kv_cache, "scratch": parts.scratch,
        "total": parts.total, "available": available,
    }  # fmt: skip
    fits = parts.total <= available
    verdict = {"fits": fits, "longest_context_that_fits": longest}
    if as_json:
        dtype = str(summary.dtype).removeprefix("torch.")
        kinds = {"model": model, "quant": quant, "dtype": dtype}
        print(json.dumps({**kinds, **values, **verdict}, indent=2))
        return
    wanted = context or config.max_seq_len
    kind = _KINDS[str(summary.dtype)] if quant == "none" else quant
    print(f"{model} in {'packed weights' if extra else kind}, {batch} x {wanted:,} tokens")
    for name, num_bytes in values.items():
        print(f"{name:<10} {num_bytes:>18,} bytes {num_bytes / 2**30:>9.2f} GiB")
    if fits:
        print(f"it fits; with up to {longest:,} tokens")
    else:
        smaller = () if summary.is_quantized else _QUANTS[_QUANTS.index(quant) + 1 :]
        print(f"it does not fit; {_find_remedy(search, smaller, longest=longest, wanted=wanted)}")


@dataclass(frozen=True, kw_only=True)
class _Search:
    """Looks for the longest context that fits."""

    config: "ModelConfig"
    bytes_per_value: int
    batch: int
    available: int

    def find_longest(self, quant: Quant, *, extra: int = 0) -> int:
        """Tokens; `extra` bytes are taken beside. 0 where nothing fits or rows fit no groups."""
        from tramontane.engine.estimate import find_longest_context

        try:
            return find_longest_context(
                self.config,
                quant=quant,
                bytes_per_value=self.bytes_per_value,
                batch=self.batch,
                available=self.available - extra,
            )
        except ConfigError:
            return 0


def _parse_ram(gibibytes: float) -> int:
    if not 0 < gibibytes < 2**40:
        raise RequestError(f"--ram is {gibibytes}; it must be a number of GiB above zero")
    return round(gibibytes * 2**30)


def _count_free(memory: dict[str, int | None]) -> int:
    """What this process may still use."""
    free = memory["free_bytes"]
    if free is None:
        raise RequestError("this system does not say how much memory is free; give --ram in GiB")
    return free


def _find_remedy(search: _Search, smaller: Sequence[Quant], *, longest: int, wanted: int) -> str:
    """What would make it fit: a shorter context, or fewer bits; nothing that would not."""
    if longest:
        return f"with --context {longest} it does"
    for quant in smaller:
        if tokens := search.find_longest(quant):
            shorter = f" --context {tokens}" if tokens < wanted else ""
            return f"with --quant {quant}{shorter} it does"
    return "this takes a larger machine"
