"""Expected tensors against stored ones, before and while they are read; no layout is known here."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tramontane.checkpoint.differences import (
    describe_shape,
    is_missing,
    list_absent_files,
    list_names,
    name_with_reason,
)
from tramontane.checkpoint.files.stored_tensor import DTYPE_NAMES, DTYPES, StoredTensor
from tramontane.checkpoint.name_table import ExpectedTensor, NameTable, TensorMap
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError
from tramontane.kernels.dispatch import get_kernels


class TensorPair(NamedTuple):
    """A tensor that is as it should be: what was expected, and where it lies."""

    expected: ExpectedTensor
    stored: StoredTensor


def check_names(
    table: NameTable,
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    *,
    where: str,
    files: Sequence[Path] = (),
) -> None:
    """Raise CheckpointError if `where` speaks of another kind or number of layers or experts.

    It lists what is missing or too many, and what `files` of a numbered series are not there.
    """
    num_experts = table.count_experts(stored)
    if (num_experts == 0) != (config.moe is None):
        kinds = {True: "a dense model ('mistral')", False: "a mixture of experts ('mixtral')"}
        raise CheckpointError(
            f"{where} describes {kinds[config.moe is None]}, the tensors are "
            f"{kinds[num_experts == 0]}; these files do not belong together"
        )
    counts = {"n_layers": (config.n_layers, table.count_layers(stored))}
    if config.moe is not None:
        counts["num_experts"] = (config.moe.num_experts, num_experts)
    phrases = [
        f"{table.fields[name]} is {said}, the tensors have {found}"
        for name, (said, found) in counts.items()
        if said != found
    ]
    if phrases:
        phrases += _list_strangers(table, config, stored) + list_absent_files(files)
        raise CheckpointError(
            f"{where}: {'; '.join(phrases)}; incomplete download, or files that do not belong "
            "together?"
        )


def _list_strangers(
    table: NameTable, config: ModelConfig, stored: Mapping[str, StoredTensor]
) -> list[str]:
    """Names that are missing or too many; a configuration that is far off is not spelled out."""

    def is_stored(name: str) -> bool:
        is_tied = name == table.output and config.tie_embeddings
        return is_tied or any(spelling in stored for spelling in table.list_spellings(name))

    def is_beyond(name: str) -> bool:
        match = table.pattern.fullmatch(name)
        numbers = match.groupdict() if match else {}
        layer = int(numbers.pop("layer", None) or 0)
        expert = max((int(number) for number in numbers.values() if number), default=0)
        num_experts = config.moe.num_experts if config.moe else 1
        return match is None or layer >= config.n_layers or expert >= num_experts

    missing = (name for name in table.list_names(config) if not is_stored(name))
    return list_names("missing", missing) + list_names("unexpected", filter(is_beyond, stored))


def match_tensors(
    expected: TensorMap, stored: Mapping[str, StoredTensor], *, folder: Path
) -> list[TensorPair]:
    """Pairs in the order in which they lie on disk.

    Raises CheckpointError on a tensor of another shape (naming the field of the configuration that
    it contradicts) or encoding, and lists all tensors that are missing or unexpected.
    """
    pairs = [TensorPair(expected[name], stored[name]) for name in expected if name in stored]
    for pair in pairs:
        _check_shape(*pair)
        _check_encoding(*pair)
    missing = (name_with_reason(n, t) for n, t in expected.items() if is_missing(n, t, stored))
    unexpected = (name for name in stored if name not in expected)
    if lists := list_names("missing", missing) + list_names("unexpected", unexpected):
        lists += list_absent_files({tensor.path: None for tensor in stored.values()})
        raise CheckpointError(f"{folder}: {'; '.join(lists)}; incomplete download?")
    return sorted(pairs, key=lambda pair: (pair.stored.path, pair.stored.begin))


def count_values(pairs: Iterable[TensorPair]) -> Counter[torch.dtype]:
    """Values of each dtype that is wanted of them: packed ones of a GGUF are wanted in bfloat16.

    Tensors that have to be as they are, those of packed weights, are left out.
    """
    counts: Counter[torch.dtype] = Counter()
    for expected, stored in pairs:
        if expected.encoding is None:
            dtype = stored.dtype if stored.encoding in DTYPES else torch.bfloat16
            counts[dtype] += math.prod(stored.shape)
    return counts


def describe_mix(pairs: Iterable[TensorPair]) -> list[str]:
    """What becomes of weights of several dtypes, with an example of each; nothing of one alone."""
    pairs = list(pairs)
    counts = count_values(pairs)
    if len(counts) <= 1:
        return []
    examples = {p.stored.dtype: p.stored.place for p in pairs if p.expected.encoding is None}
    mix = ", ".join(f"{place} is {dtype}" for dtype, place in examples.items())
    main = counts.most_common(1)[0][0]
    return [f"the weights have several dtypes ({mix}): all become {main}, which most values have"]


def find_doubts(config: ModelConfig, *, where: str) -> tuple[str, ...]:
    """What a configuration says and is likely wrong."""
    window, context = config.sliding_window, config.max_seq_len
    if config.moe is None or window is None or window >= context:
        return ()
    return (
        f"{where}: sliding_window is {window:,}, so each token sees no more than that of a context "
        f"of {context:,}. Mixtral was trained without a window, and early config.json files on the "
        "hub had 4096 by mistake: make it null, unless this model was trained with one",
    )


def check_finite_values(values: Tensor, stored: StoredTensor) -> None:
    """Raise CheckpointError if `values`, read from `stored`, hold NaN or an infinity."""
    if not values.is_floating_point() or get_kernels().is_finite(values):
        return
    remedy = "a damaged file or a diverged training; download it again"
    if values.dtype != stored.dtype:
        remedy += ", or values beyond that: load it in another (in Python dtype=, for good by "
        remedy += "tramontane convert --type)"
    raise CheckpointError(
        f"{stored.place} has values that are not finite in {values.dtype} (stored as "
        f"{stored.dtype}): {remedy}; in Python, check_finite=False looks inside"
    )


def check_factors(stored: StoredTensor, config: ModelConfig) -> None:
    """Raise CheckpointError unless the factors of RoPE's frequencies are all one.

    There is one for each pair of a head: S/2 numbers, of which few bytes are read.
    """
    if stored.shape != (config.head_dim // 2,) or stored.encoding not in DTYPES:
        raise CheckpointError(
            f"{stored.place} has {stored.encoding} of shape {list(stored.shape)}; "
            f"[{config.head_dim // 2}] of {' or '.join(DTYPES)} belong there"
        )
    factors = stored.read().float()
    if not (factors == 1).all():
        raise CheckpointError(
            f"{stored.place} scales RoPE's frequencies by {factors.min():g} to {factors.max():g}; "
            "only unscaled RoPE is built"
        )


def _check_shape(expected: ExpectedTensor, stored: StoredTensor) -> None:
    if fault := describe_shape(expected, stored.shape):
        raise CheckpointError(f"{stored.place} {fault}; these files do not belong together")


def _check_encoding(expected: ExpectedTensor, stored: StoredTensor) -> None:
    is_weight = stored.encoding != DTYPE_NAMES[torch.uint8]
    if expected.encoding == stored.encoding or (expected.encoding is None and is_weight):
        return
    known = expected.encoding or " or ".join(DTYPES)
    raise CheckpointError(f"{stored.place} is stored as {stored.encoding}; it must be {known}")
