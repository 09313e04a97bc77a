"""Weights into a model: every tensor is accounted for, none is invented.

The model is built without memory, on the meta device. Tensors that have their final form stay
views of the mapped file; experts are copied straight into their stack: peak memory is that of the
model and of one tensor.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from tramontane.checkpoint.check import (
    TensorPair,
    check_finite_values,
    find_common_dtype,
    match_tensors,
)
from tramontane.checkpoint.intake import find_layout
from tramontane.checkpoint.names import Part
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError
from tramontane.models.transformer import Transformer, build_model


def load_config(folder: Path | str) -> ModelConfig:
    """The configuration of the checkpoint in `folder`. Raises CheckpointError or ConfigError."""
    path = Path(folder)
    try:
        return find_layout(path).read_config(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_model(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
) -> Transformer:
    """The model in `folder`, in evaluation mode, its weights in `dtype` (None: as stored).

    Raises ConfigError on a configuration that is not one of ours, and CheckpointError on a tensor
    that is missing, unexpected, of another shape, truncated, or (`check_finite`) NaN or infinite.
    """
    path = Path(folder)
    try:
        return _load(path, dtype=dtype, device=torch.device(device), check_finite=check_finite)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _load(
    path: Path, *, dtype: torch.dtype | None, device: torch.device, check_finite: bool
) -> Transformer:
    layout = find_layout(path)
    config = layout.read_config(path)
    stored = layout.find_tensors(path)
    layout.check_names(config, stored)
    pairs = match_tensors(layout.map_names(config, stored), stored, folder=path)
    model = build_model(config, device="meta").eval()
    values = _Collector(model, dtype=dtype or find_common_dtype(pairs), device=device)
    for pair in pairs:
        values.add(pair, check_finite=check_finite)
    _assign(model, values.parameters, pairs)
    return model


class _Collector:
    """Gathers the values of a model's parameters, each from one or several stored tensors."""

    def __init__(self, model: Transformer, *, dtype: torch.dtype, device: torch.device) -> None:
        self.parameters: dict[str, Tensor] = {}
        self._shapes = {name: value.shape for name, value in model.state_dict().items()}
        self._dtype, self._device = dtype, device

    def add(self, pair: TensorPair, *, check_finite: bool) -> None:
        """Read one stored tensor and put its parts where they belong."""
        values = pair.stored.read()
        for part in pair.expected.parts:
            placed = self._place(values, part)
            if check_finite:
                check_finite_values(placed, pair.stored)

    def _place(self, values: Tensor, part: Part) -> Tensor:
        """The values in their final place: as they are if nothing changes, copied otherwise."""
        if part.expert is None:
            rows = values if part.rows is None else values[..., part.rows, :]
            placed = rows.to(device=self._device, dtype=self._dtype).contiguous()
            self.parameters[part.parameter] = placed
            return placed
        if part.parameter not in self.parameters:
            shape = self._shapes[part.parameter]
            stack = torch.empty(shape, dtype=self._dtype, device=self._device)
            self.parameters[part.parameter] = stack
        return self.parameters[part.parameter][part.expert].copy_(values)


def _assign(model: Transformer, parameters: dict[str, Tensor], pairs: Iterable[TensorPair]) -> None:
    """Make the values the model's parameters; a tied head is the embeddings themselves."""
    if not model.config.tie_embeddings:
        model.load_state_dict(parameters, strict=True, assign=True)
        return
    embeddings = parameters["tok_embeddings.weight"]
    head = parameters.setdefault("output.weight", embeddings)
    if head is not embeddings and not torch.equal(head, embeddings):  # NaN differs from itself
        heads = (pair.stored for pair in pairs if Part("output.weight") in pair.expected.parts)
        raise CheckpointError(
            f"{next(heads).place} differs from the embeddings, but tie_word_embeddings is true; "
            "these files do not belong together"
        )
    model.load_state_dict(parameters, strict=True, assign=True)
    model.output.weight = model.tok_embeddings.weight
