"""Weights into a model: every tensor is accounted for, none is invented.

The model is built without memory, on the meta device. Parameters that lie in a file as they are
needed stay views of the mapped file, stacks of experts too where the experts follow one another;
others are read straight into their place: peak memory is that of the model and of one tensor.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tramontane.checkpoint.changes import SAME
from tramontane.checkpoint.check import TensorPair, check_finite_values
from tramontane.checkpoint.files.stored_tensor import DTYPES, StoredTensor
from tramontane.checkpoint.intake import Checkpoint, open_checkpoint
from tramontane.checkpoint.names import Part
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError
from tramontane.models.transformer import Transformer, build_model

# Threads that read; each may hold one expert more than the model (117 MB in Mixtral 8x7B).
_NUM_READERS = 2


def load_config(path: Path | str) -> ModelConfig:
    """The configuration of the checkpoint at `path`. Raises CheckpointError or ConfigError."""
    return open_checkpoint(path).config


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
) -> Transformer:
    """The model at `path`, in evaluation mode, its weights in `dtype` (None: as stored).

    `path` is a folder or a file of any layout. Raises ConfigError on a configuration that is not
    one of ours, and CheckpointError on a tensor that is missing, unexpected, of another shape,
    truncated, or (`check_finite`) NaN or infinite.
    """
    return fill_model(
        open_checkpoint(path), dtype=dtype, device=torch.device(device), check_finite=check_finite
    )


def fill_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
) -> Transformer:
    """`load_model` of a checkpoint that has been opened."""
    try:
        pairs = checkpoint.pairs
        model = build_model(checkpoint.config, device="meta").eval()
        filler = _Filler(
            model,
            dtype=dtype or checkpoint.dtype,
            device=torch.device(device),
            check_finite=check_finite,
        )
        parameters = filler.fill(pairs)
    except OSError as error:
        raise CheckpointError(f"{checkpoint.contents.path} cannot be read: {error}") from error
    _assign(model, parameters, pairs)
    return model


class _Filler:
    """Gives each parameter of a model its values, from one or several stored tensors."""

    def __init__(
        self, model: Transformer, *, dtype: torch.dtype, device: torch.device, check_finite: bool
    ) -> None:
        self._shapes = {name: value.shape for name, value in model.state_dict().items()}
        self._dtype, self._device, self._check_finite = dtype, device, check_finite

    def fill(self, pairs: Sequence[TensorPair]) -> dict[str, Tensor]:
        """All parameters by name."""
        sources: dict[str, list[tuple[Part, StoredTensor]]] = {}
        for pair in pairs:
            for part in pair.expected.parts:
                located = (part, part.locate(pair.stored))
                sources.setdefault(part.parameter, []).append(located)
        parameters: dict[str, Tensor] = {}
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            for name, parts in sources.items():
                whole = self._find_whole(parts)
                if whole is not None:
                    parameters[name] = whole.read().to(self._device)
                    work = partial(self._check, parameters[name])
                else:
                    parameters[name] = torch.empty(
                        self._shapes[name], dtype=self._dtype, device=self._device
                    )
                    work = partial(self._copy, parameters[name])
                list(readers.map(work, parts))
        return parameters

    def _find_whole(self, parts: Sequence[tuple[Part, StoredTensor]]) -> StoredTensor | None:
        """The stored values as one tensor, if they need neither conversion nor gathering."""
        parts = sorted(parts, key=lambda pair: pair[0].expert or 0)
        first = parts[0][1]
        end = first.begin
        for part, stored in parts:
            is_plain = stored.encoding in DTYPES and part.change is SAME
            if stored.dtype != self._dtype or not is_plain:
                return None
            if stored.path != first.path or stored.begin != end or first.begin % 64:
                return None if len(parts) > 1 else first
            end = stored.end
        if parts[0][0].expert is None:
            return first
        return replace(first, shape=(len(parts), *first.shape), end=end)

    def _copy(self, target: Tensor, source: tuple[Part, StoredTensor]) -> None:
        part, stored = source
        place = part.find_place(target)
        is_plain = stored.dtype == self._dtype or stored.encoding not in DTYPES
        if is_plain and part.change is SAME and self._device.type == "cpu":
            stored.read_into(place)
        else:
            place.copy_(part.change.to_ours(stored.read()))
        self._check(target, source)

    def _check(self, target: Tensor, source: tuple[Part, StoredTensor]) -> None:
        part, stored = source
        if self._check_finite:
            check_finite_values(part.find_place(target), stored)


def _assign(model: Transformer, parameters: dict[str, Tensor], pairs: Sequence[TensorPair]) -> None:
    """Make the values the model's parameters; a tied head is the embeddings themselves."""
    if not model.config.tie_embeddings:
        model.load_state_dict(parameters, strict=True, assign=True)
        return
    embeddings = parameters["tok_embeddings.weight"]
    head = parameters.setdefault("output.weight", embeddings)
    if head is not embeddings and not torch.equal(head, embeddings):  # NaN differs from itself
        raise CheckpointError(
            f"{next(_find_heads(pairs)).place} differs from the embeddings, but "
            "tie_word_embeddings is true; these files do not belong together"
        )
    model.load_state_dict(parameters, strict=True, assign=True)
    model.output.weight = model.tok_embeddings.weight


def _find_heads(pairs: Sequence[TensorPair]) -> Iterator[StoredTensor]:
    return (p.stored for p in pairs if Part("output.weight") in p.expected.parts)
