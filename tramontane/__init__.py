"""tramontane: the whole Mixtral system in one small, readable codebase.

    from tramontane import LLM, SamplingParams
    print(LLM().generate("Once upon a time", SamplingParams(max_tokens=100)).text)

Names are imported when they are first used, so that `tramontane --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tramontane.engine.llm import LLM
    from tramontane.engine.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_LAZY = {"LLM": "tramontane.engine.llm", "SamplingParams": "tramontane.engine.sampling_params"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tramontane' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
