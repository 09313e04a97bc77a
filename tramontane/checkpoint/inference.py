"""The architecture that tensor names and shapes speak of, when no configuration says it."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tramontane.checkpoint.differences import find_differences
from tramontane.checkpoint.intake import LAYOUTS, describe_strangers
from tramontane.checkpoint.name_table import NameTable
from tramontane.config import ModelConfig, MoeConfig
from tramontane.errors import CheckpointError, ConfigError

Shapes = Mapping[str, tuple[int, ...]]
_HEAD_DIMS = (128, 64, 96, 80, 32, 16)  # of published models, the most usual first
_MAX_LAYERS = 10_000
_MAX_EXPERTS = 2**15  # of all layers together


@dataclass(frozen=True)
class InferredModel:
    """What shapes tell; `assumed` lists what they do not, `problems` what contradicts it."""

    table: NameTable
    config: ModelConfig
    assumed: tuple[str, ...]
    problems: tuple[str, ...]


def infer_model(shapes: Shapes) -> InferredModel:
    """Infer the configuration from tensor names and shapes alone.

    Raises CheckpointError if the names are those of no layout, or a shape that is needed is not
    there. Head size, RoPE and context leave no trace in the shapes: they are assumed.
    """
    tables = [table for layout in LAYOUTS for table in layout.tables]
    table = max(tables, key=lambda table: table.count_matches(shapes))
    if not table.count_matches(shapes):
        raise CheckpointError(describe_strangers(shapes))
    vocab_size, dim = _find(shapes, table.tok_embeddings, rank=2)
    layers = _list_layers(table, shapes)
    layer = table.layer.format(layer=min(layers))
    query_rows = _find(shapes, layer + table.attention["wq"], rank=2)[0]
    key_rows = _find(shapes, layer + table.attention["wk"], rank=2)[0]
    num_experts = _count_experts(table, layer, shapes)
    if num_experts * (max(layers) + 1) > _MAX_EXPERTS:
        raise CheckpointError(f"{num_experts:,} experts in {max(layers) + 1:,} layers: no model's")
    head_dim = next((d for d in _HEAD_DIMS if key_rows % d == 0 and query_rows % d == 0), key_rows)
    assumed = [f"head_dim {head_dim}", "rope_theta, sliding_window and context"]
    if num_experts:
        assumed.append(f"{min(2, num_experts)} experts per token")
    try:
        config = ModelConfig(
            dim=dim,
            n_layers=max(layers) + 1,
            head_dim=head_dim,
            hidden_dim=_find_hidden_dim(table, layer, shapes, num_experts=num_experts),
            n_heads=query_rows // head_dim if head_dim else 0,
            n_kv_heads=key_rows // head_dim if head_dim else 0,
            vocab_size=vocab_size,
            tie_embeddings=table.output not in shapes,
            moe=MoeConfig(num_experts, min(2, num_experts)) if num_experts else None,
        )
    except ConfigError as error:
        raise CheckpointError(f"the shapes contradict each other: {error}") from None
    problems = _find_gaps(layers) + _find_differences(table, config, shapes)
    return InferredModel(table, config, tuple(assumed), tuple(problems))


def _find_differences(table: NameTable, config: ModelConfig, shapes: Shapes) -> list[str]:
    """What does not follow from the configuration that the first layer and its like gave."""
    known = {
        name: shape
        for name, shape in shapes.items()
        if not (table.is_derived(name) or table.is_factor(name))
    }
    return find_differences(table.map_tensors(config), known)


def _find_gaps(layers: Collection[int]) -> list[str]:
    """Which layers are not there, although later ones are."""
    absent = set(range(max(layers))) - set(layers)
    starts = sorted(number for number in absent if number - 1 not in absent)
    stops = sorted(number for number in absent if number + 1 not in absent)
    pairs = zip(starts, stops, strict=True)
    ranges = [str(first) if first == last else f"{first} to {last}" for first, last in pairs]
    return [f"{len(absent)} layers are not there: {', '.join(ranges[:50])}"] if absent else []


def _find(shapes: Shapes, name: str, *, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        raise CheckpointError(f"the architecture cannot be inferred: {name} is missing")
    if len(shapes[name]) != rank:
        raise CheckpointError(
            f"{name} has shape {list(shapes[name])}; {rank} dimensions belong there"
        )
    return shapes[name]


def _list_layers(table: NameTable, shapes: Iterable[str]) -> set[int]:
    """The numbers of the layers that the names speak of."""
    matches = (table.pattern.fullmatch(name) for name in shapes)
    numbers = {int(match["layer"]) for match in matches if match and match["layer"]}
    if not numbers:
        raise CheckpointError("the architecture cannot be inferred: no layer is there")
    if max(numbers) >= _MAX_LAYERS:
        raise CheckpointError(f"a name speaks of layer {max(numbers)!s:.20}, which no model has")
    return numbers


def _count_experts(table: NameTable, layer: str, shapes: Shapes) -> int:
    """Rows of the router, or what the names or shapes of experts say without one; 0 if dense."""
    if layer + table.gate in shapes:
        return _find(shapes, layer + table.gate, rank=2)[0]
    name = layer + table.experts["w1"]
    if table.expert_form == "each":
        numbers = range(_MAX_EXPERTS)
        return next((n for n in numbers if name.format(expert=n) not in shapes), len(numbers))
    if name in shapes and table.expert_form != "flat":
        return _find(shapes, name, rank=3)[0]
    return 0


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
