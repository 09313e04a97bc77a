"""What a checkpoint is, from its headers alone: configuration, counts, bytes, what lies where."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tramontane.checkpoint import hf, mistral
from tramontane.checkpoint.inference import infer_model, read_listing
from tramontane.checkpoint.intake import Checkpoint, open_checkpoint
from tramontane.config import PRESETS, ModelConfig, get_preset
from tramontane.errors import CheckpointError

_SIDE_FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer.model", "tokenizer.model.v1", "tokenizer.model.v3"),
    "chat template": ("chat_template.jinja",),
    "sampling defaults": ("generation_config.json",),
    "history of training": ("training.json",),
}
_GGUF_KEYS = {"tokenizer": "tokenizer.ggml.model", "chat template": "tokenizer.chat_template"}


@dataclass(frozen=True)
class Summary:
    """One model. Bytes are those on disk; `problems` keep it from being loaded."""

    name: str
    layout: str
    config: ModelConfig
    bytes_by_encoding: Mapping[str, int] = field(default_factory=dict)
    found: Mapping[str, str] = field(default_factory=dict)  # what -> where
    assumed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the figures that follow from the configuration."""
        count = self.config.count_parameters()
        return asdict(self) | {
            "parameters": count.total,
            "active_parameters": count.active,
            "kv_bytes_per_token": self.config.count_kv_bytes_per_token(),
        }


def summarize(name: str) -> Summary:
    """The preset, checkpoint or listing of tensors that `name` is.

    Raises CheckpointError if it is none of these, naming what was looked for.
    """
    if name in PRESETS:
        return Summary(name, "a preset, no weights", get_preset(name))
    path = Path(name)
    if path.is_file() and path.suffix in (".txt", ".json", ".list"):
        inferred = infer_model(read_listing(path))
        return Summary(
            name,
            f"a listing of tensors named as by {inferred.table.title}",
            inferred.config,
            assumed=inferred.assumed,
        )
    return summarize_checkpoint(open_checkpoint(path), name=name)


def read_config_alone(folder: Path) -> ModelConfig:
    """The configuration in a folder that need not hold weights. Raises CheckpointError if none."""
    if (folder / hf.CONFIG_FILE).is_file():
        return hf.read_hf_config(folder)
    if (folder / mistral.CONFIG_FILE).is_file():
        return mistral.read_mistral_config(folder)
    return open_checkpoint(folder).config


def summarize_checkpoint(checkpoint: Checkpoint, *, name: str) -> Summary:
    """A checkpoint on disk; where its configuration is missing, what the shapes tell."""
    contents = checkpoint.contents
    sizes: Counter[str] = Counter()
    for tensor in contents.stored.values():
        sizes[tensor.encoding] += tensor.end - tensor.begin
    assumed: tuple[str, ...] = ()
    problems: list[str] = []
    has_config = (
        contents.container == "gguf" or (contents.folder / checkpoint.layout.config_file).is_file()
    )
    if has_config:
        config = checkpoint.config
        try:
            _ = checkpoint.pairs
        except CheckpointError as error:
            problems.append(str(error))
    else:
        shapes = {name: tensor.shape for name, tensor in contents.stored.items()}
        inferred = infer_model(shapes)
        config, assumed = inferred.config, inferred.assumed
        problems.append(f"{contents.folder} has no {checkpoint.layout.config_file}")
    return Summary(
        name,
        checkpoint.table.title,
        config,
        bytes_by_encoding=dict(sizes.most_common()),
        found=_find_what_is_there(checkpoint, has_config=has_config),
        assumed=assumed,
        problems=tuple(problems),
    )


def _find_what_is_there(checkpoint: Checkpoint, *, has_config: bool) -> dict[str, str]:
    contents = checkpoint.contents
    files = sorted(contents.files)
    total = sum(file.stat().st_size for file in files)
    weights = files[0].name if len(files) == 1 else f"{len(files)} files, {files[0].name} first"
    found = {"weights": f"{weights}, {total:,} bytes"}
    if has_config:
        found["configuration"] = checkpoint.layout.config_file
    for what, names in _SIDE_FILES.items():
        if where := next((name for name in names if (contents.folder / name).is_file()), None):
            found[what] = where
    if contents.container == "gguf":
        keys = {what: key for what, key in _GGUF_KEYS.items() if key in contents.metadata}
        found |= {what: f"the metadata ({key})" for what, key in keys.items()}
    return found
