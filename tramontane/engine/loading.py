"""A model ready to run: plain, quantised on load, or with the packed weights that its file has."""

import torch

from tramontane.checkpoint.intake import Checkpoint
from tramontane.checkpoint.loader import fill_model
from tramontane.checkpoint.quantized import list_parameters
from tramontane.errors import ConfigError
from tramontane.models.transformer import Transformer
from tramontane.quant.apply import ModelPacker
from tramontane.quant.formats import QuantFormat, QuantRecipe, choose_formats


def load_for_running(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quant: str | QuantRecipe | None = None,
    keep_packed: bool = True,
) -> Transformer:
    """The model of an opened checkpoint, in evaluation mode.

    `quant` rounds weights as they are read: a format such as "int4" for experts and attention, or a
    recipe. Otherwise `keep_packed` runs the matrices of a GGUF packed that are Q4_0 or Q8_0 there.
    Raises ConfigError on a format or on rows that do not fit it, and what `fill_model` does.
    """
    if quant is not None:
        if checkpoint.layout.is_quantized:
            raise ConfigError(f"{checkpoint.contents.path} is quantised already; load it as it is")
        recipe = quant if isinstance(quant, QuantRecipe) else parse_recipe(quant)
        formats = choose_formats(list_parameters(checkpoint.config), recipe)
    else:
        formats = dict(checkpoint.formats) if keep_packed or checkpoint.layout.is_quantized else {}
    packer = ModelPacker(formats) if formats else None
    return fill_model(checkpoint, dtype=dtype, device=device, packer=packer)


def parse_recipe(name: str) -> QuantRecipe:
    """Experts and attention in the format called "int4", "int8-g128", ... Raises ConfigError."""
    return QuantRecipe.from_format(QuantFormat.parse(name))
