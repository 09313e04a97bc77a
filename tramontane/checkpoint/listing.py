"""A bare listing of tensors, as people print and post them: names, shapes, perhaps dtypes.

Read are lines such as `norm.weight [4096] BF16`, `norm.weight torch.Size([4096])` and
`'norm.weight': (4096,)`, and JSON: names to shapes, or to objects with a shape as in a safetensors
header.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tramontane.bounded_json import parse_json
from tramontane.checkpoint.files.untrusted import MAX_RANK, check_name, is_countable, shorten
from tramontane.errors import CheckpointError

# A name, what may stand between, and whole numbers in brackets.
_ENTRY = re.compile(
    r"""(?<![\w.])(?P<name>[A-Za-z_][\w.-]*+)(?P<between>[^\[(\n]{0,80}+)"""
    r"""\(?[\[(](?P<sizes>[\d,\s]*+)[\])]""",
    re.ASCII,
)
_ENCODINGS = {
    "F32": "F32", "FLOAT32": "F32", "FLOAT": "F32", "F16": "F16", "FLOAT16": "F16", "HALF": "F16",
    "BF16": "BF16", "BFLOAT16": "BF16",
}  # fmt: skip
_WORD = re.compile(r"\w+", re.ASCII)
_MAX_TENSORS = 2**16
_MAX_BYTES = 2**22  # 1,739 tensors of Mixtral 8x22B take 150 KB
_MAX_DIGITS = 18  # of a size: what is larger is beyond any file


@dataclass(frozen=True)
class ListedTensor:
    """A shape, and how the values are stored if the listing says so: F32, F16 or BF16."""

    shape: tuple[int, ...]
    encoding: str | None = None


Listing = Mapping[str, ListedTensor]


def parse_listing(content: bytes, *, path: Path) -> Listing:
    """The tensors by name. Raises CheckpointError, naming the line or key that is none."""
    if content.lstrip()[:1] == b"{":
        try:
            values = parse_json(content, where=str(path))
        except CheckpointError:
            if b"'" not in content:  # else it is what Python prints of a dict
                raise
        else:
            return parse_json_listing(values, path=path)
    if len(content) > _MAX_BYTES:
        raise CheckpointError(f"{path} has {len(content):,} bytes, too many for a listing")
    listing: dict[str, ListedTensor] = {}
    for number, line in enumerate(_iterate_lines(_decode(content, path)), start=1):
        where = f"{path}:{number}"
        for name, tensor in _parse_line(line, where=where):
            if name in listing:
                raise CheckpointError(f"{where}: {name} is there twice")
            if len(listing) == _MAX_TENSORS:
                raise CheckpointError(f"{where}: more than {_MAX_TENSORS:,} tensors are no model's")
            listing[name] = tensor
    return listing


def parse_json_listing(values: Mapping[str, Any], *, path: Path) -> Listing:
    """The same from an object: name -> shape, or name -> object with "shape" and "dtype"."""
    listing = {}
    for name, value in values.items():
        if name == "__metadata__":
            continue
        where = f"{path}: {check_name(name, where=f'{path}: the name of a tensor')}"
        is_entry = isinstance(value, dict)
        sizes, dtype = (value.get("shape"), value.get("dtype")) if is_entry else (value, None)
        is_list = isinstance(sizes, list) and len(sizes) <= MAX_RANK
        if not is_list or not all(type(size) is int and size >= 0 for size in sizes):
            raise CheckpointError(f"{where} has no shape, but {shorten(value)}")
        encoding = _find_encoding(dtype) if isinstance(dtype, str) else None
        listing[name] = _check_tensor(ListedTensor(tuple(sizes), encoding), where=where)
    return listing


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is neither a checkpoint nor a listing of tensors") from None


def _iterate_lines(text: str) -> Iterator[str]:
    """The lines one by one, as a list of all could take far more memory than the text."""
    begin = 0
    while begin < len(text):
        end = text.find("\n", begin)
        end = len(text) if end < 0 else end
        yield text[begin:end]
        begin = end + 1


def _parse_line(line: str, *, where: str) -> Iterator[tuple[str, ListedTensor]]:
    """All tensors in a line; an empty one has none, and one bracket of a dict neither."""
    matches = list(_ENTRY.finditer(line))
    if not matches and line.strip(" \t\r{}[](),"):
        raise CheckpointError(
            f"{where}: {line.strip()[:60]!a} is not a tensor's name and its shape, such as: "
            "model.norm.weight [4096]"
        )
    ends = [*(match.start() for match in matches[1:]), len(line)]
    for match, end in zip(matches, ends, strict=False):
        name = check_name(match["name"], where=f"{where}: the name of a tensor")
        sizes = [size for size in re.split(r"[\s,]+", match["sizes"]) if size]
        if len(sizes) > MAX_RANK or any(len(size) > _MAX_DIGITS for size in sizes):
            raise CheckpointError(f"{where}: {name} has the shape [{match['sizes'][:60]}...]")
        words = match["between"] + " " + line[match.end() : min(end, match.end() + 80)]
        tensor = ListedTensor(tuple(map(int, sizes)), _find_encoding(words))
        yield name, _check_tensor(tensor, where=f"{where}: {name}")


def _find_encoding(words: str) -> str | None:
    """The first word that is a dtype."""
    found = (_ENCODINGS.get(word.upper()) for word in _WORD.findall(words))
    return next((encoding for encoding in found if encoding), None)


def _check_tensor(tensor: ListedTensor, *, where: str) -> ListedTensor:
    if not is_countable(tensor.shape):
        raise CheckpointError(f"{where} has shape {shorten(list(tensor.shape))}, beyond any file")
    return tensor
