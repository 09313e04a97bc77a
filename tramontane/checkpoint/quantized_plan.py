"""Where each tensor of a quantised folder will lie, before any of them is there.

Files can be filled in any order then, and a run that was interrupted knows what is missing.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from tramontane.checkpoint.files.safetensors_file import encode_header
from tramontane.checkpoint.files.stored_tensor import UNPACKED
from tramontane.checkpoint.layout import Formats
from tramontane.checkpoint.quantized import (
    OUR_NAMES,
    WEIGHTS_FILE,
    list_parameters,
    pack_tensors,
)
from tramontane.checkpoint.writer import split_shards
from tramontane.config import ModelConfig
from tramontane.quant.formats import QuantRecipe, TensorSpec, choose_formats, name_packed

_ALIGNMENT = 64
_HEAD, _EMBEDDINGS = "output.weight", "tok_embeddings.weight"


class Unit(NamedTuple):
    """What is read, rounded and written at once: a parameter, or one expert of a stack.

    `source` is the parameter that has the values: the embeddings, for a head that is tied to them.
    """

    parameter: str
    expert: int | None
    source: str
    num_bytes: int

    @property
    def key(self) -> str:
        """Such as layers.0.feed_forward.experts.w1[3]."""
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"


class Place(NamedTuple):
    """A tensor's file, the position of its first byte there, and what it is."""

    file: str
    begin: int
    spec: TensorSpec


@dataclass(frozen=True)
class FolderPlan:
    """The files of `config` quantised by `recipe`, plain tensors in `dtype`.

    Raises ConfigError on rows that do not fit the groups, naming the parameter.
    """

    config: ModelConfig
    recipe: QuantRecipe
    dtype: torch.dtype
    max_shard_bytes: int

    @cached_property
    def formats(self) -> Formats:
        """Those of the parameters that are packed."""
        return choose_formats(self.shapes, self.recipe)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of all parameters, before."""
        return list_parameters(self.config)

    @cached_property
    def units(self) -> list[Unit]:
        """All that has to be written, in the order of the layers."""
        units = []
        for parameter, shape in self.shapes.items():
            is_tied = parameter == _HEAD and self.config.tie_embeddings
            source = _EMBEDDINGS if is_tied else parameter
            if parameter in self.formats:
                matrix = shape[-2:]
                num_bytes = self.formats[parameter].count_bytes(matrix)
                experts = range(shape[0]) if len(shape) == 3 else [None]
                units += [Unit(parameter, expert, source, num_bytes) for expert in experts]
            elif not is_tied:
                units.append(Unit(parameter, None, source, self._specs[parameter].num_bytes))
        return units

    def find_dtype(self, parameter: str) -> torch.dtype:
        """That of a parameter which is not packed."""
        return self._specs[parameter].dtype

    @cached_property
    def shards(self) -> dict[str, list[str]]:
        """The tensors of each file, in their order there.

        Sizes that are a multiple of 64 bytes, nearly all, come first: so each begins at one.
        """
        sizes = {name: spec.num_bytes for name, spec in self._specs.items()}
        stem = WEIGHTS_FILE.removesuffix(".safetensors")
        shards = split_shards(sizes, stem=stem, max_bytes=self.max_shard_bytes)
        return {
            file: sorted(names, key=lambda name: -_find_alignment(sizes[name]))
            for file, names in shards.items()
        }

    @cached_property
    def places(self) -> dict[str, Place]:
        """Each tensor's place by its name."""
        places = {}
        for file, names in self.shards.items():
            position = len(self.encode_header(file))
            for name in names:
                places[name] = Place(file, position, self._specs[name])
                position += self._specs[name].num_bytes
        return places

    def encode_header(self, file: str) -> bytes:
        """The beginning of one of the files."""
        return encode_header({name: self._specs[name] for name in self.shards[file]})

    def count_bytes(self, file: str) -> int:
        """The size of one of the files."""
        sizes = (self._specs[name].num_bytes for name in self.shards[file])
        return len(self.encode_header(file)) + sum(sizes)

    def list_tensors(self, parameter: str) -> dict[str, str]:
        """The tensors of a parameter by suffix; that of a plain one is empty."""
        if parameter not in self.formats:
            return {"": parameter}
        suffixes = self.formats[parameter].list_tensors(self.shapes[parameter])
        return {suffix: name_packed(parameter, suffix) for suffix in suffixes}

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        expected = pack_tensors(OUR_NAMES.map_tensors(self.config), self.formats)
        return {
            name: TensorSpec(tensor.shape, UNPACKED.get(tensor.encoding or "", self.dtype))
            for name, tensor in expected.items()
            if not tensor.is_optional
        }


def _find_alignment(num_bytes: int) -> int:
    """The largest power of two, up to 64, that divides a size."""
    return min(num_bytes & -num_bytes or _ALIGNMENT, _ALIGNMENT)
