"""Our own folder of packed weights: what Hugging Face's is, but tensors as the kernels read them.

config.json has a "quantization_config" that says how each part is packed. Tensors bear the names of
our parameters; in the place of a packed one stand .qweight, .scales and, if the format is not
symmetric, .zeros (`kernels/packing.py`). So loading is mapping: nothing is unpacked or copied.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tramontane.checkpoint.files.json_file import read_json
from tramontane.checkpoint.files.stored_tensor import DTYPE_NAMES
from tramontane.checkpoint.files.untrusted import shorten
from tramontane.checkpoint.hf import CONFIG_FILE
from tramontane.checkpoint.layout import Contents, Formats, Layout
from tramontane.checkpoint.name_table import Dim, ExpectedTensor, NameTable, Part, TensorMap
from tramontane.checkpoint.names import HF, OURS
from tramontane.config import ModelConfig
from tramontane.errors import ConfigError
from tramontane.quant.formats import (
    SUFFIXES,
    QuantFormat,
    QuantRecipe,
    choose_formats,
    name_packed,
)

# Not model.safetensors: transformers 5 skips a quant_method that it does not know, with a warning,
# and would give random weights to the names it misses. Without that file it refuses the folder.
WEIGHTS_FILE = "quantized.safetensors"
QUANT_METHOD = "tramontane"
_KEY = "quantization_config"
_VERSION = 1  # of the order of the bytes


class _OurNames(NameTable):
    """Our parameters under their own names, each plain or packed."""

    def list_spellings(self, name: str) -> tuple[str, ...]:
        """The name itself, and those of its packed tensors."""
        return (name, *(name_packed(name, suffix) for suffix in SUFFIXES))


OUR_NAMES = _OurNames(**vars(OURS) | {"title": "tramontane, quantised", "fields": HF.fields})


def list_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters of `config` by name; a tied head is among them."""
    return {name: tensor.shape for name, tensor in OUR_NAMES.map_tensors(config).items()}


def describe_recipe(recipe: QuantRecipe) -> dict[str, Any]:
    """What config.json says about it."""
    return {_KEY: {"quant_method": QUANT_METHOD, "version": _VERSION, **recipe.to_dict()}}


def is_ours(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a quantised folder of ours."""
    quantization = values.get(_KEY)
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def read_quantized_config(folder: Path) -> tuple[ModelConfig, QuantRecipe]:
    """Both configurations in config.json. Raises CheckpointError (unreadable) or ConfigError."""
    path = folder / CONFIG_FILE
    values = read_json(path)
    try:
        if not is_ours(values):
            raise ConfigError(
                f"the tensors are packed by {QUANT_METHOD}, but {_KEY} is "
                f"{shorten(values.get(_KEY))}; these files do not belong together"
            )
        recipe = _parse_recipe(values.pop(_KEY))
        return ModelConfig.from_hf(values), recipe
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def pack_tensors(tensors: TensorMap, formats: Formats) -> TensorMap:
    """The tensors of a folder: those of OUR_NAMES, the packed ones each as two or three."""
    packed: TensorMap = {}
    for name, tensor in tensors.items():
        if name in formats:
            packed |= _pack_tensor(name, tensor, formats[name])
        else:
            packed[name] = tensor
    return packed


def _pack_tensor(name: str, tensor: ExpectedTensor, format: QuantFormat) -> TensorMap:
    *stack, rows, columns = tensor.dims
    packed: TensorMap = {}
    for suffix, spec in format.list_tensors(tensor.shape).items():
        per_column = 32 // format.bits if suffix == "qweight" else format.group_size
        fields = [f"{rows.field} / 16, rounded up,", f"{columns.field} / {per_column}", "lanes"]
        fields += ["values of a lane"] if suffix == "qweight" else []
        sizes = spec.shape[len(stack) :]
        dims = (*stack, *map(Dim, fields, sizes))
        packed[name_packed(name, suffix)] = ExpectedTensor(
            dims,
            (Part(name_packed(name, suffix)),),
            reason=f"{_KEY} says {format.name}",
            encoding=DTYPE_NAMES[spec.dtype],
        )
    return packed


def _parse_recipe(values: Mapping[str, Any]) -> QuantRecipe:
    version = values.get("version")
    if type(version) is not int or version != _VERSION:
        raise ConfigError(
            f"{_KEY}: version is {shorten(version)}; {_VERSION} is read: quantise the model again"
        )
    parts = {key: values[key] for key in values if key not in ("quant_method", "version")}
    return QuantRecipe.from_dict(parts)


def _read_config(contents: Contents) -> ModelConfig:
    return read_quantized_config(contents.folder)[0]


def _find_formats(tensors: TensorMap, contents: Contents) -> Formats:
    recipe = read_quantized_config(contents.folder)[1]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    try:
        return choose_formats(shapes, recipe)
    except ConfigError as error:
        raise ConfigError(f"{contents.folder / CONFIG_FILE}: {error}") from None


QUANTIZED = Layout(
    name="quantized",
    containers=("safetensors",),
    tables=(OUR_NAMES,),
    config_file=CONFIG_FILE,
    read_config=_read_config,
    find_formats=_find_formats,
    pack_tensors=pack_tensors,
    is_quantized=True,
)
