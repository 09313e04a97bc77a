"""The architecture that tensor names and shapes speak of, when no configuration says it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tramontane.checkpoint.files.json_file import MAX_BYTES
from tramontane.checkpoint.intake import LAYOUTS
from tramontane.checkpoint.names import NameTable
from tramontane.config import ModelConfig, MoeConfig
from tramontane.errors import CheckpointError, ConfigError

Shapes = Mapping[str, tuple[int, ...]]
_LINE = re.compile(r"\s*([\w.]+)\W+?[\[(]([\d,\s]+)[\])].*")  # model.norm.weight  [4096]  BF16
_HEAD_DIMS = (128, 64, 96, 80, 32, 16)  # of published models, the most usual first


@dataclass(frozen=True)
class InferredModel:
    """What shapes tell; `assumed` lists what they do not."""

    table: NameTable
    config: ModelConfig
    assumed: tuple[str, ...]


def infer_model(shapes: Shapes) -> InferredModel:
    """Infer the configuration from tensor names and shapes alone.

    Raises CheckpointError if the names are those of no layout, or a shape that is needed is not
    there. Head size, RoPE and context leave no trace in the shapes: they are assumed.
    """
    tables = [table for layout in LAYOUTS for table in layout.tables]
    table = max(tables, key=lambda table: table.count_matches(shapes))
    if not table.count_matches(shapes):
        raise CheckpointError(f"no tensor is one of a Mistral or Mixtral: {sorted(shapes)[:3]}")
    vocab_size, dim = _find(shapes, table.tok_embeddings, rank=2)
    layer = table.layer.format(layer=_find_layer(table, shapes))
    query_rows = _find(shapes, layer + table.attention["wq"], rank=2)[0]
    key_rows = _find(shapes, layer + table.attention["wk"], rank=2)[0]
    num_experts = shapes[layer + table.gate][0] if layer + table.gate in shapes else 0
    head_dim = next((d for d in _HEAD_DIMS if key_rows % d == 0 and query_rows % d == 0), key_rows)
    tie_embeddings = table.output not in shapes
    assumed = [f"head_dim {head_dim}", "rope_theta, sliding_window and context"]
    if num_experts:
        assumed.append("2 experts per token")
    try:
        config = ModelConfig(
            dim=dim,
            n_layers=table.count_layers(shapes),
            head_dim=head_dim,
            hidden_dim=_find_hidden_dim(table, layer, shapes, num_experts=num_experts),
            n_heads=query_rows // head_dim,
            n_kv_heads=key_rows // head_dim,
            vocab_size=vocab_size,
            tie_embeddings=tie_embeddings,
            moe=MoeConfig(num_experts, min(2, num_experts)) if num_experts else None,
        )
    except ConfigError as error:
        raise CheckpointError(f"the shapes contradict each other: {error}") from None
    return InferredModel(table, config, tuple(assumed))


def read_listing(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from a text file: `name [4096, 4096]` in each line, or JSON.

    JSON maps names to shapes, or to objects with a shape as a safetensors header does. Raises
    CheckpointError if a line or value is neither, naming it.
    """
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} is too large for a listing of tensors")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is neither a checkpoint nor a listing of tensors") from None
    if text.lstrip().startswith("{"):
        return _parse_json_listing(text, path)
    shapes = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if match := _LINE.fullmatch(line):
            sizes = [size for size in re.split(r"[\s,]+", match[2].strip()) if size]
            shapes[match[1]] = tuple(map(int, sizes))
        elif line.strip():
            raise CheckpointError(
                f"{path}:{number}: {line.strip()[:60]!r} is not a tensor's name and its "
                "shape, such as: model.norm.weight [4096]"
            )
    return shapes


def _parse_json_listing(text: str, path: Path) -> dict[str, tuple[int, ...]]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    shapes = {}
    for name, value in values.items():
        if name == "__metadata__":
            continue
        sizes = value.get("shape") if isinstance(value, dict) else value
        if not isinstance(sizes, list) or not all(type(s) is int and s >= 0 for s in sizes):
            raise CheckpointError(f"{path}: {name} has no shape, but {str(value)[:60]}")
        shapes[name] = tuple(sizes)
    return shapes


def _find(shapes: Shapes, name: str, *, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"the architecture cannot be inferred: {name} is missing")
    if len(shapes[name]) != rank:
        raise CheckpointError(
            f"{name} has shape {list(shapes[name])}; {rank} dimensions belong there"
        )
    return shapes[name]


def _find_layer(table: NameTable, shapes: Shapes) -> str:
    """The first layer that the names speak of."""
    matches = (table.pattern.fullmatch(name) for name in shapes)
    numbers = [match["layer"] for match in matches if match and match["layer"]]
    if not numbers:
        raise CheckpointError("the architecture cannot be inferred: no layer is there")
    return min(numbers, key=int)


def _find_hidden_dim(table: NameTable, layer: str, shapes: Shapes, *, num_experts: int) -> int:
    if not num_experts:
        return _find(shapes, layer + table.dense["w1"], rank=2)[0]
    name = layer + table.experts["w1"].format(expert=0)
    if table.expert_form == "each":
        return _find(shapes, name, rank=2)[0]
    if table.expert_form == "flat":
        return _find(shapes, name, rank=2)[0] // num_experts
    rows = _find(shapes, name, rank=3)[1]
    return rows // 2 if table.expert_form == "fused" else rows
