"""What a table of tensor names says: which tensors a checkpoint holds, and where each one goes.

The tables themselves are in names.py.

D dim, F hidden_dim, E experts, H heads, G kv heads, S head_dim.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from tramontane.checkpoint.changes import SAME, TRANSPOSE, Change, pair_halves
from tramontane.checkpoint.files.stored_tensor import StoredTensor
from tramontane.config import ModelConfig, MoeConfig
from tramontane.errors import CheckpointError


class Dim(NamedTuple):
    """One dimension of a tensor: what the configuration calls it, and its size."""

    field: str
    size: int


@dataclass(frozen=True)
class Part:
    """What a foreign tensor gives to one of our parameters.

    `expert` is the slice of a stacked parameter that it fills (None: all of it). Of the foreign
    tensor it is what `index` selects in the first dimension (None: all), of that the `rows` (None:
    all), and `change` is what has to be done to them.
    """

    parameter: str
    expert: int | None = None
    index: int | None = None
    rows: slice | None = None
    change: Change = SAME

    def locate(self, stored: StoredTensor) -> StoredTensor:
        """Where the part's values lie, before the change: one run of bytes."""
        if self.index is not None:
            stored = stored.select(self.index)
        return stored if self.rows is None else stored.narrow(self.rows)

    def find_place(self, parameter: Tensor) -> Tensor:
        """Where the values go in our parameter."""
        return parameter if self.expert is None else parameter[self.expert]


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a checkpoint of a given configuration has to hold, and where it goes.

    `reason` says what in the configuration asks for it, where that is not plain. `encoding` is the
    only one in which it may be stored; None stands for any in which weights are.
    """

    dims: tuple[Dim, ...]
    parts: tuple[Part, ...]
    is_optional: bool = False
    reason: str = ""
    encoding: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes alone."""
        return tuple(dim.size for dim in self.dims)


TensorMap = dict[str, ExpectedTensor]
NamedTensors = Iterator[tuple[str, ExpectedTensor]]
Matrices = dict[str, str]  # w1, w2, w3 -> name


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """The names of one layout, called `title`. `layer` stands before all but the first three.

    `expert_form` is how experts lie: `each` one tensor per expert and matrix; `stacked` (E, F, D)
    and, for w2, (E, D, F); `flat` (E*F, D) with w2 transposed, as in the torrent; `fused` w1 over
    w3, (E, 2F, D), under the name of w1. `fields` are the configuration's own words for ours.
    `extras` are what routers and layouts beside Mixtral's keep in a layer, ours -> theirs; a table
    without them has no names for such models.
    """

    title: str
    tok_embeddings: str
    norm: str
    output: str
    layer: str
    attention: Mapping[str, str]  # wq, wk, wv, wo
    attention_norm: str
    ffn_norm: str
    dense: Matrices
    gate: str
    experts: Matrices
    expert_form: Literal["each", "stacked", "flat", "fused"]
    rope_pairs: Literal["halves", "neighbours"]
    fields: Mapping[str, str]
    derived: str = ""  # ends the names of tensors that follow from the configuration
    factors: str = ""  # ends the names of factors of RoPE's frequencies, which have to be one
    extras: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches every name of the table; groups `layer` and `expert` are the numbers in it."""
        in_layer = [
            *self.attention.values(), self.attention_norm, self.ffn_norm, *self.dense.values(),
            self.gate, *self.experts.values(), *self.extras.values(),
        ]  # fmt: skip
        spellings = dict.fromkeys(s for name in in_layer for s in self.list_spellings(name))
        escaped = [re.escape(name) for name in spellings]
        alternatives = "|".join(
            name.replace(r"\{expert\}", rf"(?P<expert{number}>\d+)")  # a group's name stands once
            for number, name in enumerate(escaped)
        )
        names = (self.tok_embeddings, self.norm, self.output)
        top = "|".join(re.escape(s) for name in names for s in self.list_spellings(name))
        prefix = re.escape(self.layer).replace(r"\{layer\}", r"(?P<layer>\d+)")
        return re.compile(f"{top}|{prefix}(?:{alternatives})")

    def list_spellings(self, name: str) -> tuple[str, ...]:
        """The names under which what this table calls `name` may be stored."""
        return (name,)

    def count_matches(self, stored: Collection[str]) -> int:
        """How many of the stored names are names of this table."""
        return sum(self.pattern.fullmatch(name) is not None for name in stored)

    def count_layers(self, stored: Collection[str]) -> int:
        """How many layers the stored names speak of."""
        matches = (self.pattern.fullmatch(name) for name in stored)
        return len({match["layer"] for match in matches if match and match["layer"]})

    def count_experts(self, stored: Mapping[str, StoredTensor]) -> int:
        """How many experts the stored tensors speak of, by names or by the router; 0 if dense."""
        numbers: set[str] = set()
        num_rows = 0
        for name, tensor in stored.items():
            if match := self.pattern.fullmatch(name):
                groups = match.groupdict()
                numbers |= {v for key, v in groups.items() if key != "layer" and v is not None}
                if name.endswith(self.gate):
                    num_rows = max(num_rows, tensor.shape[0] if tensor.shape else 1)
        return len(numbers) if self.expert_form == "each" else num_rows

    def is_derived(self, name: str) -> bool:
        """Whether a tensor holds only what follows from the configuration, and is passed over."""
        return bool(self.derived) and name.endswith(self.derived)

    def is_factor(self, name: str) -> bool:
        """Whether a tensor scales the frequencies of RoPE."""
        return bool(self.factors) and name.endswith(self.factors)

    def list_names(self, config: ModelConfig) -> Iterator[str]:
        """The names of `map_tensors`, one by one: a configuration may claim a billion layers."""
        yield from (self.tok_embeddings, self.norm, self.output)
        for layer in range(config.n_layers):
            theirs = self.layer.format(layer=layer)
            for name in (*self.attention.values(), self.attention_norm, self.ffn_norm):
                yield theirs + name
            if config.moe is None:
                yield from (theirs + name for name in self.dense.values())
                continue
            yield theirs + self.gate
            yield from (theirs + self.extras[name] for name, _ in self._list_extras(config.moe))
            for name in self.experts.values():
                if self.expert_form != "each":
                    yield theirs + name
                    continue
                for expert in range(config.moe.num_experts):
                    yield theirs + name.format(expert=expert)

    def map_tensors(self, config: ModelConfig) -> TensorMap:
        """All tensors that a checkpoint of `config` has in this layout.

        Raises CheckpointError on a sparse model that is no Mixtral, if the layout has none.
        """
        self._require_names(config)
        dim, vocab = self._dim("dim", config.dim), self._dim("vocab_size", config.vocab_size)
        tensors = {
            self.tok_embeddings: _whole("tok_embeddings.weight", vocab, dim),
            self.norm: _whole("norm.weight", dim),
            self.output: ExpectedTensor(
                (vocab, dim),
                (Part("output.weight"),),
                is_optional=config.tie_embeddings,
                reason=f"{self.fields['tie_embeddings']} is false",
            ),
        }
        for layer in range(config.n_layers):
            theirs, ours = self.layer.format(layer=layer), f"layers.{layer}"
            tensors.update(self._map_attention(config, theirs, ours))
            if config.moe is None:
                tensors.update(self._map_dense(config, theirs, ours))
            else:
                tensors.update(self._map_experts(config.for_layer(layer), theirs, ours))
        return tensors

    def _require_names(self, config: ModelConfig) -> None:
        if config.moe is not None and not config.moe.is_mixtral and not self.extras:
            raise CheckpointError(
                f"a model with moe.router {config.moe.router!r}, moe.residual "
                f"{config.moe.residual} and moe.layer_experts {list(config.moe.layer_experts)} is "
                f"no Mixtral: no other program runs it, and the layout {self.title} has no place "
                "for it; keep it in the folder that training wrote"
            )

    def _list_extras(self, moe: MoeConfig) -> list[tuple[str, tuple[str, ...]]]:
        """Our name below the layer's feed-forward part, and the dimensions, of what is extra."""
        parameters, buffers = moe.list_extra_tensors()
        return list((parameters | buffers).items()) if self.extras else []

    def _map_attention(self, config: ModelConfig, theirs: str, ours: str) -> NamedTensors:
        dim = self._dim("dim", config.dim)
        heads = {"wq": config.n_heads, "wo": config.n_heads}
        for matrix, name in self.attention.items():
            num_heads = heads.get(matrix, config.n_kv_heads)
            field = "n_heads" if matrix in heads else "n_kv_heads"
            words = f"{self.fields[field]} * {self.fields['head_dim']}"
            width = Dim(words, num_heads * config.head_dim)
            turned = matrix in ("wq", "wk") and self.rope_pairs == "neighbours"
            part = Part(
                f"{ours}.attention.{matrix}.weight",
                change=pair_halves(config.head_dim) if turned else SAME,
            )
            dims = (dim, width) if matrix == "wo" else (width, dim)
            yield theirs + name, ExpectedTensor(dims, (part,))
        for norm in ("attention_norm", "ffn_norm"):
            yield theirs + getattr(self, norm), _whole(f"{ours}.{norm}.weight", dim)

    def _map_dense(self, config: ModelConfig, theirs: str, ours: str) -> NamedTensors:
        for matrix, name in self.dense.items():
            parameter = f"{ours}.feed_forward.{matrix}.weight"
            yield theirs + name, _whole(parameter, *self._matrix_dims(config, matrix))

    def _map_experts(self, config: ModelConfig, theirs: str, ours: str) -> NamedTensors:
        assert config.moe is not None, config
        experts = self._dim("num_experts", config.moe.num_experts)
        dim = self._dim("dim", config.dim)
        yield theirs + self.gate, _whole(f"{ours}.feed_forward.gate.weight", experts, dim)
        yield from self._map_extras(config, config.moe, theirs, ours)
        for matrix, name in self.experts.items():
            parameter = f"{ours}.feed_forward.experts.{matrix}"
            dims = self._matrix_dims(config, matrix)
            if self.expert_form == "each":
                for expert in range(experts.size):
                    part = Part(parameter, expert=expert)
                    yield theirs + name.format(expert=expert), ExpectedTensor(dims, (part,))
            elif self.expert_form == "flat":
                yield theirs + name, self._flatten_experts(config, parameter, matrix)
            elif self.expert_form == "fused" and matrix == "w1":
                yield theirs + name, self._fuse_experts(config, f"{ours}.feed_forward.experts")
            else:
                parts = (Part(parameter, expert=e, index=e) for e in range(experts.size))
                yield theirs + name, ExpectedTensor((experts, *dims), tuple(parts))

    def _map_extras(
        self, config: ModelConfig, moe: MoeConfig, theirs: str, ours: str
    ) -> NamedTensors:
        """Parameters in the weights' dtype; buffers, whose steps are small, in F32."""
        sizes = {"dim": config.dim, "hidden_dim": config.hidden_dim, "num_experts": moe.num_experts}
        _, buffers = moe.list_extra_tensors()
        for name, fields in self._list_extras(moe):
            dims = (self._dim(f, sizes[f]) if f in sizes else Dim(f, int(f)) for f in fields)
            yield (
                theirs + self.extras[name],
                ExpectedTensor(
                    tuple(dims),
                    (Part(f"{ours}.feed_forward.{name}"),),
                    reason=f"moe.router is {moe.router!r}, moe.residual {moe.residual}",
                    encoding="F32" if name in buffers else None,
                ),
            )

    def _flatten_experts(self, config: ModelConfig, parameter: str, matrix: str) -> ExpectedTensor:
        assert config.moe is not None, config
        count, hidden = config.moe.num_experts, config.hidden_dim
        change = TRANSPOSE if matrix == "w2" else SAME
        parts = (
            Part(parameter, expert=e, rows=slice(e * hidden, (e + 1) * hidden), change=change)
            for e in range(count)
        )
        words = f"{self.fields['num_experts']} * {self.fields['hidden_dim']}"
        dims = (Dim(words, count * hidden), self._dim("dim", config.dim))
        return ExpectedTensor(dims, tuple(parts))

    def _fuse_experts(self, config: ModelConfig, stack: str) -> ExpectedTensor:
        assert config.moe is not None, config
        count, hidden = config.moe.num_experts, config.hidden_dim
        halves = {"w1": slice(0, hidden), "w3": slice(hidden, 2 * hidden)}
        parts = (
            Part(f"{stack}.{matrix}", expert=e, index=e, rows=rows)
            for e in range(count)
            for matrix, rows in halves.items()
        )
        dims = (
            self._dim("num_experts", count),
            Dim(f"2 * {self.fields['hidden_dim']}", 2 * hidden),
            self._dim("dim", config.dim),
        )
        return ExpectedTensor(dims, tuple(parts))

    def _matrix_dims(self, config: ModelConfig, matrix: str) -> tuple[Dim, Dim]:
        """w1 and w3 are (F, D), w2 is (D, F)."""
        hidden = self._dim("hidden_dim", config.hidden_dim)
        dim = self._dim("dim", config.dim)
        return (dim, hidden) if matrix == "w2" else (hidden, dim)

    def _dim(self, field: str, size: int) -> Dim:
        return Dim(self.fields[field], size)


def _whole(parameter: str, *dims: Dim) -> ExpectedTensor:
    return ExpectedTensor(dims, (Part(parameter),))
