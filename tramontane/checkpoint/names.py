"""The only place where foreign tensor names live: which part of which of our parameters each is.

Hugging Face keeps Mixtral in two forms: one tensor per expert and matrix (transformers 4, and every
published checkpoint), and all experts of a layer fused (transformers 5 in memory). D dim, F
hidden_dim, E experts.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tramontane.config import ModelConfig


class Dim(NamedTuple):
    """One dimension of a tensor: what the configuration file calls it, and its size."""

    field: str
    size: int


class Part(NamedTuple):
    """What a foreign tensor gives to one of our parameters.

    `expert` is the slice of a stacked parameter that it fills (None: all of it); `rows` are the
    foreign tensor's rows (its second dimension from the end) that go there (None: all).
    """

    parameter: str
    expert: int | None = None
    rows: slice | None = None


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a checkpoint of a given configuration has to hold, and where it goes.

    `reason` says what in the configuration asks for it, where that is not plain.
    """

    dims: tuple[Dim, ...]
    parts: tuple[Part, ...]
    is_optional: bool = False
    reason: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes alone."""
        return tuple(dim.size for dim in self.dims)


TensorMap = dict[str, ExpectedTensor]
NamedTensors = Iterator[tuple[str, ExpectedTensor]]

_HF_HEAD = "lm_head.weight"
_HF_ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
_HF_DENSE = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_HF_NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HF_EXPERTS = ".block_sparse_moe.experts."
# Angles that old writers stored although they follow from the configuration.
_HF_DERIVED_SUFFIX = ".rotary_emb.inv_freq"


def map_hf(config: ModelConfig, stored: Collection[str] = ()) -> TensorMap:
    """Names in a Hugging Face checkpoint of `config`, in the form that the `stored` names have.

    Without `stored` names: one tensor per expert, the form that every transformers reads.
    """
    has_fused_experts = any(name.endswith(".mlp.experts.gate_up_proj") for name in stored)
    dim, vocab = Dim("hidden_size", config.dim), Dim("vocab_size", config.vocab_size)
    tensors = {
        "model.embed_tokens.weight": _whole("tok_embeddings.weight", vocab, dim),
        "model.norm.weight": _whole("norm.weight", dim),
        _HF_HEAD: ExpectedTensor(
            (vocab, dim),
            (Part("output.weight"),),
            is_optional=config.tie_embeddings,
            reason="tie_word_embeddings is false",
        ),
    }
    for layer in range(config.n_layers):
        theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
        tensors.update(_map_hf_attention(config, theirs, ours))
        if config.moe is None:
            tensors.update(_map_hf_dense(config, theirs, ours))
        elif has_fused_experts:
            tensors.update(_map_hf_fused_experts(config, theirs, ours))
        else:
            tensors.update(_map_hf_experts(config, theirs, ours))
    return tensors


def is_derived(name: str) -> bool:
    """Whether a tensor holds only what follows from the configuration; it may be passed over."""
    return name.endswith(_HF_DERIVED_SUFFIX)


def count_hf_layers(stored: Collection[str]) -> int:
    """How many layers the names in a Hugging Face checkpoint speak of."""
    return len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})


def count_hf_experts(stored: Collection[str]) -> int | None:
    """How many experts the names speak of: 0 if dense, None if the experts are fused."""
    if any(".mlp.experts." in name for name in stored):
        return None
    parts = (name.partition(_HF_EXPERTS)[2] for name in stored)
    return len({part.split(".")[0] for part in parts if part})


def _whole(parameter: str, *dims: Dim) -> ExpectedTensor:
    return ExpectedTensor(dims, (Part(parameter),))


def _map_hf_attention(config: ModelConfig, theirs: str, ours: str) -> NamedTensors:
    dim = Dim("hidden_size", config.dim)
    queries = Dim("num_attention_heads * head_dim", config.n_heads * config.head_dim)
    keys = Dim("num_key_value_heads * head_dim", config.n_kv_heads * config.head_dim)
    dims = {"wq": (queries, dim), "wk": (keys, dim), "wv": (keys, dim), "wo": (dim, queries)}
    for matrix, name in _HF_ATTENTION.items():
        parameter = f"{ours}.attention.{matrix}.weight"
        yield f"{theirs}.self_attn.{name}.weight", _whole(parameter, *dims[matrix])
    for norm, name in _HF_NORMS.items():
        yield f"{theirs}.{name}.weight", _whole(f"{ours}.{norm}.weight", dim)


def _map_hf_dense(config: ModelConfig, theirs: str, ours: str) -> NamedTensors:
    for matrix, name in _HF_DENSE.items():
        parameter = f"{ours}.feed_forward.{matrix}.weight"
        yield f"{theirs}.mlp.{name}.weight", _whole(parameter, *_matrix_dims(config, matrix))


def _map_hf_experts(config: ModelConfig, theirs: str, ours: str) -> NamedTensors:
    experts = _count_experts(config)
    yield _map_gate(config, f"{theirs}.block_sparse_moe", ours)
    for expert in range(experts.size):
        for matrix in ("w1", "w2", "w3"):
            part = Part(f"{ours}.feed_forward.experts.{matrix}", expert=expert)
            name = f"{theirs}{_HF_EXPERTS}{expert}.{matrix}.weight"
            yield name, ExpectedTensor(_matrix_dims(config, matrix), (part,))


def _map_hf_fused_experts(config: ModelConfig, theirs: str, ours: str) -> NamedTensors:
    experts, hidden = _count_experts(config), config.hidden_dim
    dim = Dim("hidden_size", config.dim)
    stack = f"{ours}.feed_forward.experts"
    yield _map_gate(config, f"{theirs}.mlp", ours)
    gate_up = (
        Part(f"{stack}.w1", rows=slice(0, hidden)),
        Part(f"{stack}.w3", rows=slice(hidden, 2 * hidden)),
    )
    gate_up_dims = (experts, Dim("2 * intermediate_size", 2 * hidden), dim)
    yield f"{theirs}.mlp.experts.gate_up_proj", ExpectedTensor(gate_up_dims, gate_up)
    down_dims = (experts, *_matrix_dims(config, "w2"))
    yield f"{theirs}.mlp.experts.down_proj", _whole(f"{stack}.w2", *down_dims)


def _map_gate(config: ModelConfig, theirs: str, ours: str) -> tuple[str, ExpectedTensor]:
    dims = _count_experts(config), Dim("hidden_size", config.dim)
    return f"{theirs}.gate.weight", _whole(f"{ours}.feed_forward.gate.weight", *dims)


def _count_experts(config: ModelConfig) -> Dim:
    assert config.moe is not None, config
    return Dim("num_local_experts", config.moe.num_experts)


def _matrix_dims(config: ModelConfig, matrix: str) -> tuple[Dim, Dim]:
    """w1 and w3 are (F, D), w2 is (D, F)."""
    hidden, dim = Dim("intermediate_size", config.hidden_dim), Dim("hidden_size", config.dim)
    return (dim, hidden) if matrix == "w2" else (hidden, dim)
