"""What tensors and files are not as they were expected, in words that a user can look for.

They name tensors, fields of the configuration and numbered files: all of them, or the first.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tramontane.checkpoint.name_table import ExpectedTensor, TensorMap

_MAX_LISTED = 50
_MAX_COUNTED = 100_000  # names; a configuration may ask for any number of layers
# consolidated.03.pt, model-00002-of-00019.safetensors
_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<number>\d{2,5})(?:-of-(?P<count>\d{2,5}))?(?P<end>\.\w+)")
_COUNTED_FROM_ZERO = "consolidated."

Shape = tuple[int, ...]


def find_differences(expected: TensorMap, shapes: Mapping[str, Shape]) -> list[str]:
    """All that keeps tensors of these names and shapes from being the expected ones, in phrases."""
    shared = [name for name in expected if name in shapes]
    faults = [(name, describe_shape(expected[name], shapes[name])) for name in shared]
    phrases = [f"{name} {fault}" for name, fault in faults if fault]
    missing = (name_with_reason(n, t) for n, t in expected.items() if is_missing(n, t, shapes))
    unexpected = (name for name in shapes if name not in expected)
    return phrases + list_names("missing", missing) + list_names("unexpected", unexpected)


def is_missing(name: str, tensor: ExpectedTensor, stored: Mapping[str, object]) -> bool:
    """Whether a tensor should be stored and is not."""
    return name not in stored and not tensor.is_optional


def name_with_reason(name: str, tensor: ExpectedTensor) -> str:
    """Its name, and what asks for it if that is not plain."""
    return f"{name} ({tensor.reason})" if tensor.reason else name


def describe_shape(expected: ExpectedTensor, shape: Shape) -> str:
    """What shape it has and should have, and the fields that say so; empty if it is right."""
    if shape == expected.shape:
        return ""
    message = f"has shape {list(shape)}, expected {list(expected.shape)}"
    if len(shape) != len(expected.shape):
        return message
    faults = (
        f"{dim.field} is {dim.size} in the configuration, {found} in the tensor"
        for dim, found in zip(expected.dims, shape, strict=True)
        if dim.size != found
    )
    return f"{message}: {', '.join(faults)}"


def list_names(kind: str, names: Iterable[str]) -> list[str]:
    """One phrase such as "2 missing tensors: a, b", or none."""
    first: list[str] = []
    count = 0
    for name in names:
        count += 1
        if count <= _MAX_LISTED:
            first.append(name)
        elif count > _MAX_COUNTED:
            listed = ", ".join(first)
            return [f"more than {_MAX_COUNTED:,} {kind} tensors, the first of them: {listed}"]
    if not count:
        return []
    more = f" and {count - _MAX_LISTED:,} more" if count > _MAX_LISTED else ""
    return [f"{count:,} {kind} tensors: {', '.join(first)}{more}"]


def list_absent_files(files: Iterable[Path]) -> list[str]:
    """One phrase with the files that must be missing by the numbers of the others, or none."""
    series: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := _NUMBERED.fullmatch(file.name):
            key = (match["stem"], match["count"] or "", match["end"])
            series.setdefault(key, set()).add(int(match["number"]))
    absent = []
    for (stem, count, end), numbers in series.items():
        is_series = count or len(numbers) > 1 or stem == _COUNTED_FROM_ZERO
        wanted = range(1, int(count) + 1) if count else range(max(numbers) if is_series else 0)
        width = len(count) or 2
        of = f"-of-{count}" if count else ""
        absent += [f"{stem}{n:0{width}}{of}{end}" for n in wanted if n not in numbers]
    if not absent:
        return []
    more = f" and {len(absent) - _MAX_LISTED} more" if len(absent) > _MAX_LISTED else ""
    return [f"missing files, by the numbers of the others: {', '.join(absent[:_MAX_LISTED])}{more}"]
