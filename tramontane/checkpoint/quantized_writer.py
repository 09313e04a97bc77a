"""A quantised folder, written one matrix at a time: a run that is killed goes on where it was.

Beside the folder to be, until that is there whole:
.NAME.tramontane-quantizing/
  manifest.json           what is made of what; a run with another manifest is refused
  finished.jsonl          a line for each matrix below, written after that was forced to disk
  quantized.safetensors   the header, and room for all tensors; or shards
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tramontane.atomic import (
    atomic_file,
    atomic_folder,
    explain_os_error,
    require_disk_space,
    sync_path,
)
from tramontane.checkpoint.files.json_file import parse_json, read_json
from tramontane.checkpoint.hf import CONFIG_FILE
from tramontane.checkpoint.quantized import WEIGHTS_FILE, describe_recipe
from tramontane.checkpoint.quantized_plan import FolderPlan, Unit
from tramontane.checkpoint.writer import (
    GENERATION_CONFIG_FILE,
    FolderWriter,
    build_index,
    write_json,
)
from tramontane.errors import CheckpointError

_WORKING = ".tramontane-quantizing"
_MANIFEST, _FINISHED = "manifest.json", "finished.jsonl"
_SMALL_FILES_BYTES = 2**24  # configuration, index, tokenizer
_BYTES_PER_SYNC = 2**27  # forced to disk at once: what a killed process has to do again


class QuantizedFolder:
    """The folder `target`, in the making. Use as: with QuantizedFolder(...).open() as folder.

    `origin` is what the result depends on beside the plan, in JSON's values: the source's files.
    """

    def __init__(self, target: Path, plan: FolderPlan, *, origin: Mapping[str, Any]) -> None:
        self.target, self.plan = target.absolute(), plan
        self.working = self.target.with_name(f".{self.target.name}{_WORKING}")
        self._manifest = {
            "config": plan.config.to_dict(),
            "dtype": str(plan.dtype).removeprefix("torch."),
            "shard_bytes": plan.max_shard_bytes,
            **describe_recipe(plan.recipe),
            **origin,
        }
        self._errors: dict[str, float | None] = {}  # of each finished unit; None for plain ones
        self._unlogged: list[Unit] = []

    @contextmanager
    def open(self) -> Iterator["QuantizedFolder"]:
        """Begin, or go on with what an interrupted run of the same manifest has left.

        Raises CheckpointError if that run had another manifest (naming what differs) or is still
        there, ConfigError if a matrix does not fit its format, and CapacityError when the disk does
        not suffice, now or on the way.
        """
        try:
            if not self.working.exists():
                require_disk_space(self.target.parent, self.num_bytes + _SMALL_FILES_BYTES)
            self.working.mkdir(parents=True, exist_ok=True)
            with (self.working / _FINISHED).open("a+b") as log:
                self._lock(log.fileno())
                self._prepare()
                self._read_finished()
                left = (u.num_bytes for u in self.plan.units if not self.is_finished(u))
                require_disk_space(self.working, sum(left) + _SMALL_FILES_BYTES)
                try:
                    yield self
                finally:
                    self._log_finished()
        except OSError as error:
            raise explain_os_error(error, self.target) from error

    @property
    def num_finished(self) -> int:
        """Units that need not be written again."""
        return len(self._errors)

    @property
    def errors(self) -> dict[str, float]:
        """The relative error of each packed unit that is finished, by its key."""
        return {key: error for key, error in self._errors.items() if error is not None}

    @property
    def num_bytes(self) -> int:
        """Of all files of weights."""
        return sum(map(self.plan.count_bytes, self.plan.shards))

    def is_finished(self, unit: Unit) -> bool:
        """Whether a unit lies on disk."""
        return unit.key in self._errors

    def write(self, unit: Unit, tensors: Mapping[str, Tensor], *, error: float | None) -> None:
        """Put a unit's tensors, by suffix, in their places.

        Raises CheckpointError on values that are not finite.
        """
        for suffix, name in self.plan.list_tensors(unit.parameter).items():
            _check_finite(tensors[suffix], unit)
            place = self.plan.places[name]
            begin = place.begin
            if unit.expert is not None:
                begin += unit.expert * (place.spec.num_bytes // place.spec.shape[0])
            _write_at(self.working / place.file, begin, tensors[suffix])
        self._errors[unit.key] = error
        self._unlogged.append(unit)
        if sum(unit.num_bytes for unit in self._unlogged) >= _BYTES_PER_SYNC:
            self._log_finished()

    def publish(
        self,
        *,
        tokenizer: FolderWriter | None = None,
        token_ids: Mapping[str, int | list[int]] = {},
        extra_files: Mapping[str, bytes] = {},
    ) -> None:
        """Give the finished folder its name, with its configuration and side files.

        `token_ids` are the bos_token_id and eos_token_id of the vocabulary.
        """
        missing = [unit.key for unit in self.plan.units if not self.is_finished(unit)]
        assert not missing, missing
        self._log_finished()
        values = self.plan.config.to_hf(dtype=self._manifest["dtype"], token_ids=token_ids)
        generation = {key: values[key] for key in ("bos_token_id", "eos_token_id")}
        with atomic_folder(self.target, bytes_needed=_SMALL_FILES_BYTES) as new:
            for file in self.plan.shards:
                _link(self.working / file, new / file)
            if len(self.plan.shards) > 1:
                index = build_index(self.plan.shards, self.num_bytes)
                write_json(new / f"{WEIGHTS_FILE}.index.json", index)
            write_json(new / CONFIG_FILE, values | describe_recipe(self.plan.recipe))
            write_json(new / GENERATION_CONFIG_FILE, generation)
            if tokenizer is not None:
                tokenizer.save(new)
            for name, content in extra_files.items():
                (new / name).write_bytes(content)
        shutil.rmtree(self.working)

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is quantising into {self.target}") from None

    def _prepare(self) -> None:
        """Compare manifests; without one, or a file, make room for all tensors and begin."""
        manifest = self.working / _MANIFEST
        if manifest.exists():
            _compare(read_json(manifest), json.loads(json.dumps(self._manifest)), self.working)
            if all(self._is_there(file) for file in self.plan.shards):
                return
        os.truncate(self.working / _FINISHED, 0)
        for file in self.plan.shards:
            with (self.working / file).open("wb") as handle:
                handle.write(self.plan.encode_header(file))
                handle.truncate(self.plan.count_bytes(file))
        with atomic_file(manifest) as new:
            write_json(new, self._manifest)

    def _is_there(self, file: str) -> bool:
        path = self.working / file
        return path.is_file() and path.stat().st_size == self.plan.count_bytes(file)

    def _log_finished(self) -> None:
        """Force the files to disk, then the lines that say so."""
        if not self._unlogged:
            return
        names = {
            n for unit in self._unlogged for n in self.plan.list_tensors(unit.parameter).values()
        }
        for file in sorted({self.plan.places[name].file for name in names}):
            sync_path(self.working / file)
        records = ({"unit": u.key, "error": self._errors[u.key]} for u in self._unlogged)
        with (self.working / _FINISHED).open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(record) + "\n" for record in records)
        sync_path(self.working / _FINISHED)
        self._unlogged = []

    def _read_finished(self) -> None:
        """What the log says; a last line that was cut off, with its process, is removed."""
        path = self.working / _FINISHED
        content = path.read_bytes()
        lines = content[: content.rfind(b"\n") + 1]
        if len(lines) < len(content):
            os.truncate(path, len(lines))
        for line in lines.splitlines():
            record = parse_json(line, where=str(path))
            self._errors[record["unit"]] = record["error"]


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], working: Path) -> None:
    for key in new:
        if old.get(key) != new[key]:
            raise CheckpointError(
                f"{working} holds an unfinished run with {key} {old.get(key)!s:.200}, not "
                f"{new[key]!s:.200}: go on with that, or remove this folder"
            )


def _check_finite(values: Tensor, unit: Unit) -> None:
    if values.is_floating_point() and not values.isfinite().all():
        raise CheckpointError(
            f"{unit.key} has values that are not finite: a damaged file or a diverged training"
        )


def _write_at(path: Path, begin: int, values: Tensor) -> None:
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(values.contiguous().flatten().view(torch.uint8).numpy().data)


def _link(file: Path, new: Path) -> None:
    """A second name for a file; where the file system has none, the file moves.

    Then a kill before the folder has its name costs the work that was done.
    """
    try:
        os.link(file, new)
    except OSError:
        file.rename(new)
