"""What a model is, before any weight: frozen, strict configurations, presets, and parameter counts.

`model.py` has the decoder, `moe.py` its sparse part and the routers' options, `fields.py` the
checks that they share.
"""

from tramontane.config.fields import build_config, divide_heads, require_positive, to_float
from tramontane.config.model import (
    OUR_MODEL_TYPE,
    PRESETS,
    ModelConfig,
    ParameterCount,
    get_preset,
)
from tramontane.config.moe import MoeConfig

__all__ = [
    "ModelConfig",
    "MoeConfig",
    "ParameterCount",
    "PRESETS",
    "OUR_MODEL_TYPE",
    "get_preset",
    "build_config",
    "divide_heads",
    "require_positive",
    "to_float",
]
