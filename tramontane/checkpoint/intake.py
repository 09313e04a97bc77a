"""What lies at a path: files told apart by their first bytes, a layout by the tensors' names.

Nothing in a file is run: the pickle in a torch archive is read as symbols (files/torch_file.py),
and pickles of the old kind are refused by name.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from tramontane.atomic import find_previous
from tramontane.checkpoint.check import (
    TensorPair,
    check_factors,
    check_names,
    count_values,
    describe_mix,
    find_doubts,
    match_tensors,
)
from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.checkpoint.gguf import GGUF, VOCABULARY
from tramontane.checkpoint.grouping import LOOKED_FOR, find_group, list_entries
from tramontane.checkpoint.hf import HUGGING_FACE
from tramontane.checkpoint.layout import Container, Contents, Formats, Layout
from tramontane.checkpoint.mistral import MISTRAL
from tramontane.checkpoint.name_table import NameTable, TensorMap
from tramontane.checkpoint.names import STRIPED_HYENA
from tramontane.checkpoint.ours import OURS
from tramontane.checkpoint.quantized import QUANTIZED
from tramontane.checkpoint.side_files import check_side_files
from tramontane.config import ModelConfig
from tramontane.errors import CheckpointError

_LOG = logging.getLogger(__name__)
LAYOUTS: tuple[Layout, ...] = (HUGGING_FACE, MISTRAL, GGUF, OURS, QUANTIZED)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been recognised; its configuration and tensors are there on demand."""

    layout: Layout
    table: NameTable
    contents: Contents

    @cached_property
    def config(self) -> ModelConfig:
        """The configuration. Raises CheckpointError or ConfigError, naming file and field."""
        return self.layout.read_config(self.contents)

    @property
    def where_config_is(self) -> str:
        """For messages: the path of the file, or of the one whose metadata it is."""
        if self.contents.container == "gguf":
            return f"the metadata of {self.contents.files[0]}"
        return str(self.contents.folder / self.layout.config_file)

    @cached_property
    def has_config(self) -> bool:
        """Whether there is a file with the configuration, or metadata."""
        is_gguf = self.contents.container == "gguf"
        return is_gguf or (self.contents.folder / self.layout.config_file).exists()

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of most values, those of packed weights apart; GGUF's blocks count as bfloat16.

        Where there are several it is said which this is. Errors as for `pairs`.
        """
        if self.contents.container != "gguf":  # where norms are fp32 beside all
            for note in describe_mix(self.pairs):
                _LOG.warning("%s", note)
        return count_values(self.pairs).most_common(1)[0][0]

    @cached_property
    def assumed(self) -> tuple[str, ...]:
        """What of the configuration the file does not say, although it matters."""
        return self.layout.list_assumed(self.contents)

    @cached_property
    def doubts(self) -> tuple[str, ...]:
        """What the file says and is likely wrong."""
        return find_doubts(self.config, where=self.where_config_is)

    def list_notes(self) -> Iterator[str]:
        """What a user has to know when this is loaded. Raises what `config` does."""
        for what in self.assumed:
            yield f"{self.where_config_is} does not say it, and so it is assumed: {what}"
        yield from self.doubts

    @cached_property
    def formats(self) -> Formats:
        """The parameters that can be run packed as they are stored; errors as for `pairs`."""
        return self.layout.find_formats(self._expected, self.contents)

    @cached_property
    def pairs(self) -> list[TensorPair]:
        """Each tensor that the configuration asks for, and where it is stored, in that order.

        Raises CheckpointError unless all are there in their shape, and no others.
        """
        expected = self.layout.pack_tensors(self._expected, self.formats)
        return match_tensors(expected, self._stored, folder=self.contents.path)

    def require_unquantized(self, purpose: str) -> None:
        """Raise CheckpointError if the weights have no plain form on disk."""
        if self.layout.is_quantized:
            raise CheckpointError(
                f"{self.contents.path} is quantised, which is for running; {purpose} takes the "
                "model that it was made from"
            )

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        stored = dict(self.contents.stored)
        for name in self.contents.stored:
            if self.table.is_factor(name):
                check_factors(stored[name], self.config)
            if self.table.is_factor(name) or self.table.is_derived(name):
                del stored[name]
        return stored

    @cached_property
    def _expected(self) -> TensorMap:
        """What the table asks for, once the names are known to be of this kind and number."""
        files = self.contents.files
        check_names(self.table, self.config, self._stored, where=self.where_config_is, files=files)
        return self.table.map_tensors(self.config)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Recognise the checkpoint at `path`, a folder or a file, from headers alone.

    Raises CheckpointError if there is none, if there are several, or if a header is damaged.
    """
    path = Path(path)
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(_explain_absence(path))
    return checkpoint


def find_checkpoint(path: Path) -> Checkpoint | None:
    """`open_checkpoint`, but None if no file at a `path` that exists holds weights."""
    try:
        if not path.exists():
            raise CheckpointError(_explain_absence(path))
        group = find_group(path, find_layout=_find_layout)
        folder = path if path.is_dir() else path.parent
        if path.is_dir() or group is None or VOCABULARY not in group.metadata:
            check_side_files(folder)  # beside a GGUF that has all itself, others' files may lie
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if group is None:
        return None
    stored = group.merge()
    layout = _find_layout(stored, group.container)
    if layout is None:
        raise CheckpointError(f"{path}: {describe_strangers(stored)}")
    files = tuple(group.tables)
    contents = Contents(path, folder, group.container, files, stored, group.metadata)
    return Checkpoint(layout, layout.choose_table(stored), contents)


def _explain_absence(path: Path) -> str:
    """Why there is no checkpoint."""
    if path.is_dir():
        found = [entry.name for entry in list_entries(path)[:8]] or "an empty folder"
        return f"{path} has no weights: looked for {LOOKED_FOR}, found {found}"
    if path.exists():
        return f"{path} is none of {LOOKED_FOR}"
    previous = find_previous(path.absolute())
    remedy = f"; a killed save left its previous version at {previous}" if previous else ""
    return f"{path} does not exist; looked for {LOOKED_FOR}{remedy}"


def describe_strangers(names: Collection[str]) -> str:
    """What tensors of no layout are."""
    if any(map(STRIPED_HYENA.fullmatch, names)):
        return "these are the tensors of a StripedHyena, which tramontane does not run yet"
    found = f"found {sorted(names)[:3]}" if names else "there are none at all"
    return f"no tensor is one of a Mistral or Mixtral, {found}"


def _find_layout(stored: Mapping[str, StoredTensor], container: Container) -> Layout | None:
    """The layout that knows most of the names, if any knows one."""

    def count(layout: Layout) -> int:
        return layout.choose_table(stored).count_matches(stored)

    best = max((known for known in LAYOUTS if container in known.containers), key=count)
    return best if count(best) else None
