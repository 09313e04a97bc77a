"""Which files of a repository make one model: its weights in one format, and what goes with them.

Names alone decide, and only names on these lists are ever taken: no pickles, no code.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from tramontane.errors import CheckpointError, ConfigError

Format = Literal["hf", "quantized", "mistral", "gguf"]

_WEIGHTS: dict[Format, re.Pattern[str]] = {
    "hf": re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors"),
    "quantized": re.compile(r"quantized(-\d{5}-of-\d{5})?\.safetensors"),  # our own
    "mistral": re.compile(r"consolidated([-.]\d+(-of-\d+)?)?\.safetensors"),
    "gguf": re.compile(r"([^/]+/)*[^/]+\.gguf"),
}
# What a format cannot do without, and what else it reads.
_CONFIG: dict[Format, str] = {
    "hf": "config.json",
    "quantized": "config.json",
    "mistral": "params.json",
}
_INDEX: dict[Format, str] = {
    "hf": "model.safetensors.index.json",
    "quantized": "quantized.safetensors.index.json",
    "mistral": "consolidated.safetensors.index.json",
}
_SHARED = re.compile(
    r"generation_config\.json|tokenizer(_config)?\.json|tokenizer\.model(\.v\d+)?|tekken\.json|"
    r"special_tokens_map\.json|added_tokens\.json|chat_template\.(json|jinja)|"
    r"(README|LICEN[CS]E|NOTICE|USE_POLICY)[^/]*"
)
_PICKLES = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt)")
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


@dataclass(frozen=True)
class Choice:
    """One model out of a repository: `weights` in one format, and the `others` it needs beside."""

    format: Format
    weights: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """All files, the small ones first."""
        return self.others + self.weights


def parse_format(text: str) -> tuple[Format, str]:
    """Read "hf", "mistral", "gguf" or "gguf:PART" into a format and a part of a file's name."""
    name, _, part = text.partition(":")
    for known in get_args(Format):
        if name == known and (not part or known == "gguf"):
            return known, part
    known_names = ", ".join(get_args(Format))
    raise ConfigError(f"--format is {text!r}; it must be {known_names} or gguf:PART_OF_A_NAME")


def choose_files(
    names: Collection[str], *, model: str, format: Format | None = None, part: str = ""
) -> Choice:
    """The files of one format: the one asked for, or the first there is of `Format`.

    `part` narrows several GGUF files down ("Q4_0"). Raises CheckpointError, naming `model`, if
    there are no such weights, not all of their parts, or several GGUF files to choose from.
    """
    found = find_formats(names)
    if not found or (format is not None and format not in found):
        raise CheckpointError(_explain_absence(names, found, model=model, format=format))
    chosen = found[0] if format is None else format
    weights = find_weights(names, chosen)
    if chosen == "gguf":
        weights = _choose_gguf(weights, part, model=model)
    if absent := find_absent_shards(weights):
        raise CheckpointError(
            f"{model} is not whole: {_shorten(absent)} is missing, by the names of the others; "
            "pull it again, or choose another repository if the hub lacks it too"
        )
    beside = {_CONFIG.get(chosen), _INDEX.get(chosen)}
    others = [name for name in names if name in beside or _SHARED.fullmatch(name)]
    return Choice(chosen, tuple(sorted(weights)), tuple(sorted(others)))


def find_formats(names: Collection[str]) -> list[Format]:
    """The formats that have weights, and their configuration, among these names."""
    return [
        known
        for known in get_args(Format)
        if find_weights(names, known) and (known not in _CONFIG or _CONFIG[known] in names)
    ]


def find_weights(names: Collection[str], format: Format) -> list[str]:
    """The weight files of one format; where shards lie beside one whole file, the shards."""
    weights = [name for name in names if _WEIGHTS[format].fullmatch(name)]
    shards = [name for name in weights if _SHARD.fullmatch(name)]
    return weights if format == "gguf" else shards or weights


def find_absent_shards(names: Collection[str]) -> list[str]:
    """What `model-00001-of-00003.safetensors` and its like say should be there and is not."""
    matches = [match for match in map(_SHARD.fullmatch, names) if match is not None]
    series = {(match["stem"], match["count"], match["suffix"]) for match in matches}
    wanted = {
        f"{stem}-{number:05}-of-{count}{suffix}"
        for stem, count, suffix in series
        for number in range(1, int(count) + 1)
    }
    return sorted(wanted - set(names))


def group_gguf(names: Iterable[str]) -> dict[str, list[str]]:
    """GGUF files by what they are called without the numbers of their parts."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        match = _SHARD.fullmatch(name)
        stem = match["stem"] if match else name.removesuffix(".gguf")
        groups.setdefault(stem, []).append(name)
    return groups


def _choose_gguf(names: list[str], part: str, *, model: str) -> list[str]:
    """One GGUF model: the name that ends in `part` if one does, else the one that has it."""
    groups = group_gguf(names)
    having = [stem for stem in groups if part.lower() in stem.lower()]
    ending = [stem for stem in having if part and stem.lower().endswith(part.lower())]
    best = ending if len(ending) == 1 else having
    if len(best) == 1:
        return groups[best[0]]
    what = f"{len(best)} GGUF models" if best else "no GGUF model"
    named = f" with {part!r} in the name" if part else ""
    raise CheckpointError(
        f"{model} has {what}{named}; choose one by a part of its name, for example "
        f"--format gguf:Q4_0, out of {', '.join(best or groups)}"
    )


def _explain_absence(
    names: Collection[str], found: list[Format], *, model: str, format: Format | None
) -> str:
    if found:
        return f"{model} has no weights in the format {format}; it has {', '.join(found)}"
    if pickles := sorted(name for name in names if _PICKLES.fullmatch(name)):
        return (
            f"{model} has its weights as pickles only ({_shorten(pickles)}), which can run code "
            "when they are read; choose a repository with safetensors or GGUF, or convert them "
            "where that may happen (transformers: save_pretrained)"
        )
    return (
        f"{model} has no weights that tramontane reads: looked for model*.safetensors or "
        "quantized*.safetensors with config.json, consolidated*.safetensors with params.json, and "
        f"*.gguf; found {_shorten(sorted(names)) or 'no files'}"
    )


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more
