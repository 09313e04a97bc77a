"""Weights into a model: every tensor is accounted for, none is invented.

The model is built without memory, on the meta device. Parameters that lie in a file as they are
needed stay views of the mapped file, stacks of experts too where the experts lie evenly spaced;
others are read straight into their place, converted some rows at a time, or packed on the way to
it: peak memory is that of the model and little more.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tramontane.checkpoint.changes import SAME
from tramontane.checkpoint.check import TensorPair, check_finite_values
from tramontane.checkpoint.files.stored_tensor import UNPACKED, StackViewer, StoredTensor
from tramontane.checkpoint.intake import Checkpoint, open_checkpoint
from tramontane.checkpoint.name_table import Part
from tramontane.checkpoint.packed import read_packed
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError
from tramontane.models.transformer import Transformer, build_model
from tramontane.quant.formats import SUFFIXES, Packer, TensorSpec, name_packed

_NUM_READERS = 2  # threads; each may hold a chunk more than the model, twice where it is unpacked
_MAX_CHUNK_BYTES = 2**24
_MAX_ITEM_BYTES = 4  # of a value, once unpacked
_LOG = logging.getLogger(__name__)
_HEAD, _EMBEDDINGS = "output.weight", "tok_embeddings.weight"

Source = tuple[Part, StoredTensor]
Sources = Mapping[str, Sequence[Source]]  # parameter -> what it is made of
Plan = tuple[Callable[[Source], None], dict[str, Tensor]]  # what to do for each source, the results


def load_config(path: Path | str) -> ModelConfig:
    """The configuration of the checkpoint at `path`. Raises CheckpointError or ConfigError."""
    return open_checkpoint(path).config


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    use_views: bool = True,
) -> Transformer:
    """The model at `path`, in evaluation mode, its weights in `dtype` (None: as stored).

    `path` is a folder or a file of any layout. With `use_views` weights may be views of the mapped
    file, whose stacks of experts need not be contiguous; without, all are in memory of their own,
    as training writes them. Raises ConfigError on a configuration that is not one of ours, and
    CheckpointError on a tensor that is missing, unexpected, of another shape, truncated, or
    (`check_finite`) NaN or infinite.
    """
    return fill_model(
        open_checkpoint(path),
        dtype=dtype,
        device=device,
        check_finite=check_finite,
        use_views=use_views,
    )


def fill_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    check_finite: bool = True,
    use_views: bool = True,
    packer: Packer | None = None,
) -> Transformer:
    """`load_model` of a checkpoint that has been opened.

    With a `packer` (`quant.apply.ModelPacker`) the model runs the weights packed for which that has
    formats: mapped where they lie so, else packed as they are read. Without one a quantised folder
    raises CheckpointError.
    """
    try:
        if packer is None:
            checkpoint.require_unquantized("loading plain weights")
        pairs = checkpoint.pairs
        model = build_model(checkpoint.config, device="meta").eval()
        if packer is not None:
            packer.swap(model)
        filler = _Filler(
            model,
            dtype=dtype or checkpoint.dtype,
            device=torch.device(device),
            check_finite=check_finite,
            use_views=use_views,
            packer=packer,
        )
        for note in checkpoint.list_notes():
            _LOG.warning("%s", note)
        parameters = filler.fill(_find_sources(pairs, model))
    except OSError as error:
        raise CheckpointError(f"{checkpoint.contents.path} cannot be read: {error}") from error
    _assign(model, parameters, pairs)
    return model


def _find_sources(pairs: Sequence[TensorPair], model: Transformer) -> Sources:
    """What each parameter is made of; a head that is packed but tied has the embeddings' values."""
    sources: dict[str, list[Source]] = {}
    for pair in pairs:
        for part in pair.expected.parts:
            sources.setdefault(part.parameter, []).append((part, part.locate(pair.stored)))
    is_head_missing = _HEAD not in sources and name_packed(_HEAD, "qweight") not in sources
    if is_head_missing and not isinstance(model.output, torch.nn.Linear):
        sources[_HEAD] = sources[_EMBEDDINGS]
    return sources


class _Filler:
    """Gives each parameter of a model its values, from one or several stored tensors.

    Parameters take the dtype asked for; buffers, which packed weights lie in, keep their own.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        dtype: torch.dtype,
        device: torch.device,
        check_finite: bool,
        use_views: bool,
        packer: Packer | None,
    ) -> None:
        buffers = dict(model.named_buffers())
        self._specs = {
            name: TensorSpec(value.shape, value.dtype if name in buffers else dtype)
            for name, value in model.state_dict().items()
        }
        self._device, self._check_finite = device, check_finite
        self._use_views, self._packer = use_views, packer
        self._stacks = StackViewer()

    def fill(self, sources: Sources) -> dict[str, Tensor]:
        """All parameters and buffers by name."""
        values: dict[str, Tensor] = {}
        views: list[tuple[Tensor, Source]] = []
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            for name, parts in sources.items():
                if self._packer is not None and name in self._packer.formats:
                    work, tensors = self._plan_packing(name, self._packer)
                elif (view := self._find_view(name, parts)) is not None:
                    values[name] = view
                    views += [(view, part) for part in parts]
                    continue
                else:
                    work, tensors = self._plan_copying(name)
                list(readers.map(work, parts))  # one parameter at a time, for its memory's sake
                values |= tensors
            views.sort(key=lambda pair: (pair[1][1].path, pair[1][1].begin))  # as a disk reads
            list(readers.map(lambda pair: self._check(*pair), views))
        return values

    def _plan_copying(self, name: str) -> Plan:
        """A tensor to be filled, and how from each part."""
        spec = self._specs[name]
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        return partial(self._copy, tensor), {name: tensor}

    def _plan_packing(self, name: str, packer: Packer) -> Plan:
        """The same for a packed weight's tensors."""
        tensors = {}
        for suffix in SUFFIXES:
            if spec := self._specs.get(name_packed(name, suffix)):
                tensors[suffix] = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)

        def work(source: Source) -> None:
            part, stored = source
            packed = read_packed(part, stored, packer.formats[name], packer=packer)
            for suffix, tensor in tensors.items():
                part.find_place(tensor).copy_(getattr(packed, suffix))

        return work, {name_packed(name, suffix): tensor for suffix, tensor in tensors.items()}

    def _find_view(self, name: str, parts: Sequence[Source]) -> Tensor | None:
        """The stored values where they are mapped, if they need neither conversion nor gathering.

        To another device they go as one tensor, or piece by piece to their place.
        """
        parts = sorted(parts, key=lambda pair: pair[0].expert or 0)
        for part, stored in parts:
            is_plain = stored.encoding in UNPACKED and part.change is SAME
            if not (self._use_views and is_plain and stored.dtype == self._specs[name].dtype):
                return None
        if parts[0][0].expert is None:
            return parts[0][1].read().to(self._device)
        if self._device.type != "cpu":
            return None
        return self._stacks.view([stored for _, stored in parts])

    def _copy(self, target: Tensor, source: Source) -> None:
        part, stored = source
        place = part.find_place(target)
        is_plain = stored.dtype == target.dtype or stored.encoding not in UNPACKED
        if is_plain and part.change is SAME and self._device.type == "cpu":
            stored.read_into(place)
        else:
            _copy_rows(place, source)
        self._check(target, source)

    def _check(self, target: Tensor, source: Source) -> None:
        part, stored = source
        if self._check_finite:
            check_finite_values(part.find_place(target), stored)


def _copy_rows(place: Tensor, source: Source) -> None:
    """Change and convert some rows at a time: of a whole tensor all pages would be in memory."""
    part, stored = source
    num_rows, block = stored.shape[0], part.change.block
    row_bytes = math.prod(stored.shape[1:]) * _MAX_ITEM_BYTES
    step = max(1, _MAX_CHUNK_BYTES // (row_bytes * block)) * block
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        values = part.change.to_ours(stored.narrow(slice(begin, end)).read())
        place.narrow(part.change.axis, begin, end - begin).copy_(values)


def _assign(model: Transformer, parameters: dict[str, Tensor], pairs: Sequence[TensorPair]) -> None:
    """Make the values the model's parameters; a tied head is the embeddings themselves.

    A tied head that is packed is a copy of them.
    """
    if not model.config.tie_embeddings or _HEAD not in model.state_dict():
        model.load_state_dict(parameters, strict=True, assign=True)
        return
    embeddings = parameters[_EMBEDDINGS]
    head = parameters.setdefault(_HEAD, embeddings)
    if head is not embeddings and not torch.equal(head, embeddings):  # NaN differs from itself
        raise CheckpointError(
            f"{next(_find_heads(pairs)).place} differs from the embeddings, but "
            "tie_word_embeddings is true; these files do not belong together"
        )
    model.load_state_dict(parameters, strict=True, assign=True)
    model.output.weight = model.tok_embeddings.weight


def _find_heads(pairs: Sequence[TensorPair]) -> Iterator[StoredTensor]:
    return (p.stored for p in pairs if Part(_HEAD) in p.expected.parts)
