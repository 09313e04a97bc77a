"""A quantised folder out of a model in memory, as `tramontane quantize` makes one of a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tramontane.checkpoint.assembly import convert_values
from tramontane.checkpoint.parameters import ParametersInMemory
from tramontane.checkpoint.quantized_plan import FolderPlan
from tramontane.checkpoint.quantized_writer import QuantizedFolder
from tramontane.models.transformer import Transformer
from tramontane.quant.fitting import measure_relative_error, quantize_weight
from tramontane.quant.formats import QuantFormat, QuantRecipe

INT4 = QuantRecipe.from_format(QuantFormat(4))


def save_quantized(
    model: Transformer,
    folder: Path,
    recipe: QuantRecipe = INT4,
    *,
    max_shard_bytes: int = 10**9,
    origin: dict[str, Any] | None = None,
    before_unit: Callable[[int], None] = lambda number: None,
) -> Path:
    """Write `folder`; `before_unit` is called with the number of each unit that is written."""
    plan = FolderPlan(model.config, recipe, torch.bfloat16, max_shard_bytes)
    parameters = ParametersInMemory(model.state_dict())
    with QuantizedFolder(folder, plan, origin=origin or {}).open() as work:
        for number, unit in enumerate(plan.units):
            if work.is_finished(unit):
                continue
            before_unit(number)
            values = parameters.read(unit.source, unit.expert)
            format = plan.formats.get(unit.parameter)
            if format is None:
                plain = convert_values(values, plan.dtype, name=unit.key)
                work.write(unit, {"": plain}, error=None)
            else:
                packed = quantize_weight(values, format)
                error = measure_relative_error(values, packed)
                work.write(unit, packed._asdict(), error=error)
        before_unit(len(plan.units))
        work.publish()
    return folder
