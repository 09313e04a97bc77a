"""Our own folder, for sparse models that are no Mixtral: another router, residual, or a pyramid.

config.json is as Hugging Face's, with a model_type of ours and the whole "moe" part; tensors bear
the names of our parameters. transformers refuses the model_type, as it should.
"""

from math import prod

from tramontane.checkpoint.hf import CONFIG_FILE, HUGGING_FACE
from tramontane.checkpoint.layout import Layout
from tramontane.checkpoint.names import OURS as OUR_NAMES
from tramontane.config import ModelConfig

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
