"""What a matrix of few bits is, and which matrices of a model are such: sizes, names, rules.

Groups of g values of a row share a scale and, if the format is not symmetric, a zero point.
N rows and K columns of a matrix, E experts.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from tramontane.errors import ConfigError
from tramontane.kernels.packing import GROUP_SIZES, LANES, PackedWeight, check_rows, pack

SUFFIXES = ("qweight", "scales", "zeros")
_NAME = re.compile(r"int(?P<bits>\d+)(-g(?P<group>\d+))?(?P<asymmetric>-asym)?")
_PART_OF_MATRIX = {
    "wq": "attention", "wk": "attention", "wv": "attention", "wo": "attention",
    "w1": "experts", "w2": "experts", "w3": "experts", "output": "head",
}  # fmt: skip
_VALUES_PER_STEP = 2**22  # fitted and packed at once: what a step holds stays below 100 MB


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that may not exist yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class Fitted(NamedTuple):
    """Rows in whole numbers: q (N, K) uint8, scales (N, K/g) fp16, zeros (N, K/g) uint8 or None."""

    q: Tensor
    scales: Tensor
    zeros: Tensor | None


class Fitter(Protocol):
    """Chooses scales and whole numbers for rows (N, K) in fp32; the seam of better fits to come."""

    def __call__(self, weight: Tensor, format: "QuantFormat", /) -> Fitted:
        """Rows do not depend on one another: a matrix may come in pieces."""
        ...


class Packer(Protocol):
    """What a loader has to be given to fill a model with packed weights; see `apply.py`."""

    @property
    def formats(self) -> Mapping[str, "QuantFormat"]:
        """The parameters that become packed weights, by their names before."""
        ...

    def swap(self, model: nn.Module) -> None:
        """Give the model, which is on device "meta", modules with packed weights."""
        ...

    def pack(self, weight: Tensor, format: "QuantFormat") -> PackedWeight:
        """One matrix (N, K) of any float."""
        ...


@dataclass(frozen=True)
class QuantFormat:
    """Whole numbers of `bits` bits with an fp16 scale for each group.

    A value is scale * (q - zero); the zero point is the middle of the range, 8 or 128, or
    (`symmetric=False`) a number that each group has to itself. Raises ConfigError on what the
    kernels do not have.
    """

    bits: int
    group_size: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        choices: dict[str, tuple[int, ...]] = {
            "bits": (4, 8), "group_size": GROUP_SIZES, "symmetric": (True, False),
        }  # fmt: skip
        for field, allowed in choices.items():
            value = getattr(self, field)
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise ConfigError(f"{field} is {value!r:.80}; the kernels have {allowed}")

    @classmethod
    def parse(cls, name: str) -> Self:
        """The format called "int4", "int8-g128", "int4-g64-asym", ... Raises ConfigError."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ConfigError(f"{name!r} is no format; such are int4, int8-g128, int4-g64-asym")
        return cls(int(match["bits"]), int(match["group"] or 32), match["asymmetric"] is None)

    @property
    def name(self) -> str:
        """Such as "int4-g32", and "int8-g128-asym" if it is not symmetric."""
        return f"int{self.bits}-g{self.group_size}{'' if self.symmetric else '-asym'}"

    @property
    def bits_per_weight(self) -> float:
        """With scales and zero points: 4.5 for int4-g32, 8.125 for int8-g128."""
        return self.bits + (16 if self.symmetric else 24) / self.group_size

    def list_tensors(self, shape: Sequence[int]) -> dict[str, TensorSpec]:
        """The tensors of a packed matrix (N, K), or of a stack (E, N, K), by suffix.

        Raises ConfigError if K is not a multiple of the group size.
        """
        *stack, num_rows, in_features = shape
        check_rows(in_features, group_size=self.group_size)
        blocks = (*stack, math.ceil(num_rows / LANES))
        groups = (*blocks, in_features // self.group_size, LANES)
        tensors = {
            "qweight": TensorSpec((*blocks, in_features * self.bits // 32, LANES, 4), torch.uint8),
            "scales": TensorSpec(groups, torch.float16),
        }
        return tensors if self.symmetric else tensors | {"zeros": TensorSpec(groups, torch.uint8)}

    def count_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a packed matrix or stack, with the rows that fill up its last blocks."""
        return sum(spec.num_bytes for spec in self.list_tensors(shape).values())


@dataclass(frozen=True, kw_only=True)
class QuantRecipe:
    """The format of each part of a model; None leaves it as it is.

    `experts` are the matrices of the experts, or of a dense model's feed-forward network. Router,
    norms and embeddings always stay: they are few, and what they say decides the most.
    """

    experts: QuantFormat | None = None
    attention: QuantFormat | None = None
    head: QuantFormat | None = None

    def __post_init__(self) -> None:
        if not any(getattr(self, field.name) for field in fields(self)):
            raise ConfigError("a recipe without a format for any part quantises nothing")

    @classmethod
    def from_format(cls, format: QuantFormat, *, head: bool = False) -> Self:
        """Experts and attention in `format`; the head, if asked for, in 8 bits."""
        head_format = QuantFormat(8, format.group_size, format.symmetric) if head else None
        return cls(experts=format, attention=format, head=head_format)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` gave. Raises ConfigError on keys or values that are not ours."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown parts {unknown}; there are {known}")
        return cls(**{part: _parse_format(part, value) for part, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values: part -> bits, group_size and symmetric, or None."""
        return asdict(self)

    def find_format(self, parameter: str) -> QuantFormat | None:
        """That of one of our parameters, by its name; None if it stays as it is."""
        part = _find_part(parameter)
        return None if part is None else getattr(self, part)


def keep_whole_stacks(formats: Mapping[str, QuantFormat]) -> dict[str, QuantFormat]:
    """Those that modules can be made of: matrices of the parts, experts only with all three."""

    def is_whole(parameter: str) -> bool:
        stack, _, matrix = parameter.rpartition(".")
        return matrix == "weight" or all(f"{stack}.{w}" in formats for w in ("w1", "w2", "w3"))

    return {p: format for p, format in formats.items() if _find_part(p) and is_whole(p)}


def choose_formats(
    shapes: Mapping[str, Sequence[int]], recipe: QuantRecipe
) -> dict[str, QuantFormat]:
    """The format of each parameter that the recipe quantises, by the parameters' names and shapes.

    Raises ConfigError, naming parameter, K and group size, on rows that do not fit the groups.
    """
    formats = {name: recipe.find_format(name) for name in shapes}
    chosen = {name: format for name, format in formats.items() if format is not None}
    for name, format in chosen.items():
        try:
            format.list_tensors(shapes[name])
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}; choose another group size") from None
    return chosen


def name_packed(parameter: str, suffix: str) -> str:
    """layers.0.attention.wq.weight, scales -> layers.0.attention.wq.scales."""
    assert suffix in SUFFIXES, suffix
    return f"{_name_module(parameter)}.{suffix}"


def pack_rows(
    shape: tuple[int, int], format: QuantFormat, fit_rows: Callable[[slice], Fitted]
) -> PackedWeight:
    """A packed matrix of `shape` (N, K) from the function that fits some of its rows, step by step.

    Raises ConfigError if a scale is not finite: values that are not, or beyond fp16.
    """
    num_rows, in_features = shape
    tensors = {
        suffix: torch.empty(spec.shape, dtype=spec.dtype)
        for suffix, spec in format.list_tensors(shape).items()
    }
    step = max(1, _VALUES_PER_STEP // (in_features * LANES)) * LANES
    for begin in range(0, num_rows, step):
        part = pack(*fit_rows(slice(begin, min(begin + step, num_rows))), bits=format.bits)
        if not part.scales.isfinite().all():
            raise ConfigError(
                f"rows {begin} and after hold values that are not finite or too large for the "
                f"fp16 scales of {format.name}"
            )
        for suffix, tensor in tensors.items():
            values = getattr(part, suffix)
            tensor[begin // LANES : begin // LANES + len(values)] = values
    zeros = tensors.get("zeros")
    return PackedWeight(tensors["qweight"], tensors["scales"], zeros, format.bits, num_rows)


def _name_module(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _find_part(parameter: str) -> str | None:
    return _PART_OF_MATRIX.get(_name_module(parameter).rpartition(".")[2])


def _parse_format(part: str, value: Any) -> QuantFormat | None:
    if value is None:
        return None
    names = {field.name for field in fields(QuantFormat)}
    if not isinstance(value, dict) or set(value) != names:
        raise ConfigError(f"{part} is {value!r:.80}; an object with {sorted(names)} belongs there")
    try:
        return QuantFormat(**value)
    except ConfigError as error:
        raise ConfigError(f"{part}: {error}") from None
