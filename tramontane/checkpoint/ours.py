"""Our own folder, for sparse models that are no Mixtral: another router, residual, or a pyramid.

config.json is as Hugging Face's, with a model_type of ours and the whole "moe" part; tensors bear
the names of our parameters. transformers refuses the model_type, as it should.
"""

from math import prod

from tramontane.checkpoint.hf import CONFIG_FILE, HUGGING_FACE
from tramontane.checkpoint.layout import Layout
from tramontane.checkpoint.names import HF, NameTable
from tramontane.config import ModelConfig
from tramontane.config.moe import RESIDUAL, ROUTERS

_NAMES = [f"gate.{name}" for kind in ROUTERS.values() for name in (*kind.parameters, *kind.buffers)]

OUR_NAMES = NameTable(
    title="tramontane",
    tok_embeddings="tok_embeddings.weight",
    norm="norm.weight",
    output="output.weight",
    layer="layers.{layer}.",
    attention={w: f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")},
    attention_norm="attention_norm.weight",
    ffn_norm="ffn_norm.weight",
    dense={w: f"feed_forward.{w}.weight" for w in ("w1", "w2", "w3")},
    gate="feed_forward.gate.weight",
    experts={w: f"feed_forward.experts.{w}" for w in ("w1", "w2", "w3")},
    expert_form="stacked",
    rope_pairs="halves",
    fields={**HF.fields, "num_experts": "moe.num_experts"},
    extras={name: f"feed_forward.{name}" for name in (*_NAMES, *RESIDUAL)},
)

OURS = Layout(
    name="tramontane",
    containers=("safetensors",),
    tables=(OUR_NAMES,),
    config_file=CONFIG_FILE,
    read_config=HUGGING_FACE.read_config,
    list_assumed=HUGGING_FACE.list_assumed,
)


def count_fixed_bytes(config: ModelConfig) -> int:
    """Bytes of what is kept in fp32 whatever the weights' dtype, and is no parameter."""
    if config.moe is None or not config.moe.options.buffers:
        return 0
    tensors = OUR_NAMES.map_tensors(config).values()
    return sum(4 * prod(tensor.shape) for tensor in tensors if tensor.encoding is not None)
