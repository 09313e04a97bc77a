"""Swaps the modules of a model for quantised ones: by the type of each module, whatever the model.

A linear layer becomes a `QuantizedLinear`, stacked experts become `QuantizedExperts`. Either the
weights are there and are rounded one matrix after another (`quantize_model`), or the model has
shapes alone and a loader fills in what it reads (`ModelPacker`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from tramontane.errors import ConfigError
from tramontane.kernels.packing import PackedWeight
from tramontane.nn.experts import GroupedExperts
from tramontane.quant.fitting import quantize_weight, round_to_nearest
from tramontane.quant.formats import Fitter, QuantFormat, QuantRecipe, choose_formats
from tramontane.quant.modules import PackedMatrix, QuantizedExperts, QuantizedLinear

Formats = Mapping[str, QuantFormat]
OnTensor = Callable[[str, int], None]  # called with the name and the bytes of each packed parameter
_EXPERT_MATRICES = ("w1", "w2", "w3")


@dataclass(frozen=True)
class ModelPacker:
    """What `checkpoint.loader.fill_model` needs to fill a model with packed weights.

    `formats` are those of the parameters that become packed, by their names before.
    """

    formats: Formats
    fitter: Fitter = round_to_nearest

    def swap(self, model: nn.Module) -> None:
        """Put quantised modules, still empty, in the places of plain ones. Raises ConfigError."""
        _swap_modules(model, self.formats, lambda name, weight, matrix: None)

    def pack(self, weight: Tensor, format: QuantFormat) -> PackedWeight:
        """One matrix (N, K) of any float. Raises ConfigError on values beyond the scales."""
        return quantize_weight(weight, format, fitter=self.fitter)


def quantize_model(
    model: nn.Module,
    recipe: QuantRecipe,
    *,
    fitter: Fitter = round_to_nearest,
    on_tensor: OnTensor | None = None,
) -> None:
    """Round the weights of `model` in place, one matrix at a time; the plain ones are freed.

    Raises ConfigError before anything is changed on rows that do not fit the groups (naming the
    parameter, K and the group size), and on the way on weights that are not finite.
    """

    def fill(name: str, weight: Tensor, matrix: PackedMatrix) -> None:
        experts = range(len(weight)) if weight.ndim == 3 else [None]
        for expert in experts:
            values = weight.detach() if expert is None else weight[expert].detach()
            try:
                packed = quantize_weight(values, matrix.format, fitter=fitter)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
            matrix.store(packed, expert)
        if on_tensor is not None:
            on_tensor(name, matrix.format.count_bytes(matrix.shape))

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    _swap_modules(model, choose_formats(shapes, recipe), fill)


def _swap_modules(
    model: nn.Module, formats: Formats, fill: Callable[[str, Tensor, PackedMatrix], None]
) -> None:
    """Replace every module whose weight has a format; `fill` gives the new one its values."""

    def pack(module: nn.Module, parameter: str, kind: type[PackedMatrix]) -> PackedMatrix:
        weight = getattr(module, parameter.rpartition(".")[2])
        matrix = kind(weight.shape, formats[parameter], device=weight.device)
        fill(parameter, weight, matrix)
        return matrix

    modules = dict(model.named_modules())
    for name in _find_owners(modules, formats):
        module = modules[name]
        if isinstance(module, GroupedExperts):
            stacks = [pack(module, f"{name}.{w}", PackedMatrix) for w in _EXPERT_MATRICES]
            new: nn.Module = QuantizedExperts(*stacks)
        else:
            new = pack(module, f"{name}.weight", QuantizedLinear)
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, new.train(module.training))


def _find_owners(modules: Mapping[str, nn.Module], formats: Formats) -> list[str]:
    """The modules whose weights have formats. ConfigError if one cannot be quantised, or not all.

    That is so of experts of which one matrix has no format, and of what is no linear layer.
    """
    owners: dict[str, None] = {}
    for parameter in formats:
        owner, _, attribute = parameter.rpartition(".")
        module = modules.get(owner)
        if isinstance(module, GroupedExperts):
            if missing := [m for m in _EXPERT_MATRICES if f"{owner}.{m}" not in formats]:
                raise ConfigError(f"{parameter} has a format, but {missing} beside it has none")
        elif not isinstance(module, nn.Linear) or attribute != "weight" or module.bias is not None:
            kind = "not there" if module is None else f"in a {type(module).__name__}"
            raise ConfigError(f"{parameter} cannot be quantised: it is {kind}, no linear layer")
        owners[owner] = None
    return list(owners)
