"""Expected tensors against stored ones, before and while they are read; no layout is known here."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.checkpoint.names import ExpectedTensor, TensorMap
from tramontane.errors import CheckpointError

_MAX_LISTED = 50


class TensorPair(NamedTuple):
    """A tensor that is as it should be: what was expected, and where it lies."""

    expected: ExpectedTensor
    stored: StoredTensor


def match_tensors(
    expected: TensorMap, stored: Mapping[str, StoredTensor], *, folder: Path
) -> list[TensorPair]:
    """Pairs in the order in which they lie on disk.

    Raises CheckpointError on a tensor of another shape (naming the field of the configuration that
    it contradicts), and lists all tensors that are missing or unexpected.
    """
    pairs = [TensorPair(expected[name], stored[name]) for name in expected if name in stored]
    for pair in pairs:
        _check_shape(*pair)
    missing = [
        f"{name} ({tensor.reason})" if tensor.reason else name
        for name, tensor in expected.items()
        if name not in stored and not tensor.is_optional
    ]
    unexpected = [name for name in stored if name not in expected]
    if missing or unexpected:
        lists = _list("missing", missing) + _list("unexpected", unexpected)
        raise CheckpointError(f"{folder}: {'; '.join(lists)}; incomplete download?")
    return sorted(pairs, key=lambda pair: (pair.stored.path, pair.stored.begin))


def find_common_dtype(pairs: Iterable[TensorPair]) -> torch.dtype:
    """The one dtype of all tensors. CheckpointError names two of them if there are more."""
    examples = {pair.stored.dtype: pair.stored for pair in pairs}
    if len(examples) > 1:
        mix = ", ".join(f"{stored.place} is {dtype}" for dtype, stored in examples.items())
        raise CheckpointError(f"the weights have several dtypes ({mix}); ask for one with dtype=")
    return next(iter(examples))


def check_finite_values(values: Tensor, stored: StoredTensor) -> None:
    """Raise CheckpointError if `values`, read from `stored`, hold NaN or an infinity."""
    low, high = values.aminmax()  # one pass, no memory; NaN wins over every number
    if not (low.isfinite() and high.isfinite()):
        raise CheckpointError(
            f"{stored.place} has values that are not finite in {values.dtype} (stored as "
            f"{stored.dtype}): a damaged file or a diverged training; download it again, or pass "
            "check_finite=False to look inside"
        )


def _check_shape(expected: ExpectedTensor, stored: StoredTensor) -> None:
    if stored.shape == expected.shape:
        return
    message = f"{stored.place} has shape {list(stored.shape)}, expected {list(expected.shape)}"
    if len(stored.shape) == len(expected.shape):
        faults = (
            f"{dim.field} is {dim.size} in the configuration, {found} in the tensor"
            for dim, found in zip(expected.dims, stored.shape, strict=True)
            if dim.size != found
        )
        message += f": {', '.join(faults)}"
    raise CheckpointError(f"{message}; these files do not belong together")


def _list(kind: str, names: list[str]) -> list[str]:
    """One phrase such as "2 missing tensors: a, b", or nothing."""
    if not names:
        return []
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return [f"{len(names)} {kind} tensors: {', '.join(names[:_MAX_LISTED])}{more}"]
