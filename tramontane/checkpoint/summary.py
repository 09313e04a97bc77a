"""What a model is, from headers alone: configuration, counts, bytes, what lies where.

A model is a checkpoint, a configuration alone, a bare listing of tensors, or a preset.
"""

import math
import os.path
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tramontane.bounded_json import parse_json
from tramontane.checkpoint import hf, mistral, quantized
from tramontane.checkpoint.check import find_doubts
from tramontane.checkpoint.files.json_file import read_small_file
from tramontane.checkpoint.files.stored_tensor import DTYPES
from tramontane.checkpoint.grouping import INDEX_SUFFIX, recognize
from tramontane.checkpoint.inference import infer_model
from tramontane.checkpoint.intake import Checkpoint, find_checkpoint, open_checkpoint
from tramontane.checkpoint.listing import Listing, parse_json_listing, parse_listing
from tramontane.checkpoint.ours import count_fixed_bytes
from tramontane.checkpoint.side_files import list_side_files
from tramontane.config import PRESETS, ModelConfig, get_preset
from tramontane.errors import CheckpointError, ConfigError
from tramontane.quant.formats import SUFFIXES, name_packed

_CONFIG_FILES = (hf.CONFIG_FILE, mistral.CONFIG_FILE)
_SHOWN_FILES = ("tokenizer", "chat template", "sampling defaults", "history of training")
_GGUF_KEYS = {"tokenizer": "tokenizer.ggml.model", "chat template": "tokenizer.chat_template"}
_LOADED_AS = torch.bfloat16  # where nothing says another dtype


@dataclass(frozen=True)
class Summary:
    """One model. `bytes_by_encoding` are those on disk; `problems` keep it from being loaded.

    `dtype` is the one it loads as, and `weight_bytes` what its weights take in memory then.
    """

    name: str
    layout: str
    config: ModelConfig
    bytes_by_encoding: Mapping[str, int] = field(default_factory=dict)
    found: Mapping[str, str] = field(default_factory=dict)  # what -> where
    assumed: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    dtype: torch.dtype = _LOADED_AS
    weight_bytes: int | None = None
    is_quantized: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the figures that follow from the configuration."""
        count = self.config.count_parameters()
        num_bytes = sum(self.bytes_by_encoding.values())
        return asdict(self) | {
            "config": self.config.to_dict(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": count.total,
            "active_parameters": count.active,
            "bits_per_weight": 8 * num_bytes / count.total if num_bytes else None,
            "kv_bytes_per_token": self.config.count_kv_bytes_per_token(),
        }


def summarize(name: str) -> Summary:
    """What lies at the path `name`, or else the preset of that name.

    Raises CheckpointError if it is none of these, naming what was looked for, and ConfigError on a
    configuration that is not one of ours.
    """
    path = Path(name)
    if name in PRESETS and not os.path.exists(path):
        return Summary(name, "a preset, no weights", get_preset(name))
    try:
        if path.is_dir():
            return _summarize_folder(path, name)
        if path.is_file() and not path.name.endswith(INDEX_SUFFIX) and recognize(path) is None:
            return _summarize_text(path, name)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return summarize_checkpoint(open_checkpoint(path), name=name)


def _summarize_folder(folder: Path, name: str) -> Summary:
    """A checkpoint, or a configuration that is there without one."""
    if (checkpoint := find_checkpoint(folder)) is not None:
        return summarize_checkpoint(checkpoint, name=name)
    for file in _CONFIG_FILES:
        if (folder / file).exists():
            return _summarize_text(folder / file, name)
    return summarize_checkpoint(open_checkpoint(folder), name=name)  # which says what is missing


def _summarize_text(path: Path, name: str) -> Summary:
    """A configuration or a listing of tensors, by what is in it."""
    content = read_small_file(path)
    if content.lstrip()[:1] == b"{":
        try:
            values = parse_json(content, where=str(path))
        except CheckpointError:
            if path.name in _CONFIG_FILES:
                raise
        else:
            if "model_type" in values or "n_layers" in values:
                return _summarize_config(values, path, name)
            return _summarize_listing(parse_json_listing(values, path=path), path, name)
    return _summarize_listing(parse_listing(content, path=path), path, name)


def _summarize_config(values: dict[str, Any], path: Path, name: str) -> Summary:
    is_mistral = "n_layers" in values
    try:
        if is_mistral:
            config, assumed = mistral.parse_params(values), mistral.list_assumed(values)
        elif quantized.is_ours(values):
            config, assumed = quantized.read_quantized_config(path.parent)[0], ()
        else:
            config, assumed = ModelConfig.from_hf(values), hf.list_assumed(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return Summary(
        name,
        "a configuration, no weights",
        config,
        found={"configuration": path.name},
        assumed=assumed,
        doubts=find_doubts(config, where=str(path)),
        dtype=_LOADED_AS if is_mistral else hf.find_dtype(values),
    )


def _summarize_listing(listing: Listing, path: Path, name: str) -> Summary:
    try:
        inferred = infer_model({name: tensor.shape for name, tensor in listing.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    counts: Counter[str] = Counter()
    for tensor in listing.values():
        if tensor.encoding is not None:
            counts[tensor.encoding] += math.prod(tensor.shape)
    return Summary(
        name,
        f"a listing of tensors named as by {inferred.table.title}",
        inferred.config,
        bytes_by_encoding={e: n * DTYPES[e].itemsize for e, n in counts.most_common()},
        assumed=inferred.assumed,
        problems=inferred.problems,
        dtype=DTYPES[counts.most_common(1)[0][0]] if counts else _LOADED_AS,
    )


def summarize_checkpoint(checkpoint: Checkpoint, *, name: str) -> Summary:
    """A checkpoint on disk; where its configuration is missing, what the shapes tell."""
    contents = checkpoint.contents
    found = _find_what_is_there(checkpoint)
    if not checkpoint.has_config:
        inferred = infer_model({name: tensor.shape for name, tensor in contents.stored.items()})
        return Summary(
            name,
            checkpoint.table.title,
            inferred.config,
            bytes_by_encoding=_count_bytes(checkpoint, {}),
            found=found,
            assumed=inferred.assumed,
            problems=(
                f"{contents.folder} has no {checkpoint.layout.config_file}",
                *inferred.problems,
            ),
        )
    config = checkpoint.config
    names: Mapping[str, str] = {}
    problems: tuple[str, ...] = ()
    dtype, weight_bytes = _LOADED_AS, None
    try:
        dtype, weight_bytes = checkpoint.dtype, _count_weight_bytes(checkpoint)
        names = _name_formats(checkpoint)
    except CheckpointError as error:
        problems = (str(error),)
    return Summary(
        name,
        checkpoint.table.title,
        config,
        bytes_by_encoding=_count_bytes(checkpoint, names),
        found=found,
        assumed=checkpoint.assumed,
        doubts=checkpoint.doubts,
        problems=problems,
        dtype=dtype,
        weight_bytes=weight_bytes,
        is_quantized=checkpoint.layout.is_quantized,
    )


def _count_weight_bytes(checkpoint: Checkpoint) -> int:
    """What the weights take once loaded: packed where they run so, the others in their dtype."""
    config, formats, size = checkpoint.config, checkpoint.formats, checkpoint.dtype.itemsize
    total = config.count_parameters().total * size + count_fixed_bytes(config)
    for name, shape in quantized.list_parameters(config).items():
        if name in formats:
            is_extra = config.tie_embeddings and name == quantized.OUR_NAMES.output
            total += formats[name].count_bytes(shape) - (not is_extra) * math.prod(shape) * size
    return total


def _name_formats(checkpoint: Checkpoint) -> dict[str, str]:
    """The format of each tensor of ours that is a part of a packed weight."""
    if not checkpoint.layout.is_quantized:
        return {}
    formats = checkpoint.formats.items()
    return {name_packed(p, suffix): format.name for p, format in formats for suffix in SUFFIXES}


def _count_bytes(checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, int]:
    """Bytes by encoding, or by what `names` has for a tensor; the most first."""
    sizes: Counter[str] = Counter()
    for name, tensor in checkpoint.contents.stored.items():
        sizes[names.get(name, tensor.encoding)] += tensor.end - tensor.begin
    return dict(sizes.most_common())


def _find_what_is_there(checkpoint: Checkpoint) -> dict[str, str]:
    contents = checkpoint.contents
    files = sorted(contents.files)
    total = sum(file.stat().st_size for file in files)
    weights = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} first"
    found = {"weights": f"{weights}, {total:,} bytes"}
    if checkpoint.has_config:
        found["configuration"] = checkpoint.layout.config_file
    for path, kind in list_side_files(contents.folder):
        if kind.what in _SHOWN_FILES:
            found.setdefault(kind.what, path.name)
    if contents.container == "gguf":
        keys = {what: key for what, key in _GGUF_KEYS.items() if key in contents.metadata}
        found |= {what: f"the metadata ({key})" for what, key in keys.items()}
    return found
