"""Picks the implementation of each kernel, once, and says which and why.

`TRAMONTANE_KERNELS=reference` runs the specification, for debugging and comparison; the default is
`fused` (torch with hand-written backward passes).
"""

import logging
import os
from functools import cache
from types import ModuleType

from tramontane.errors import ConfigError
from tramontane.kernels import fused, reference

_BACKENDS: dict[str, ModuleType] = {"fused": fused, "reference": reference}


@cache
def get_kernels() -> ModuleType:
    """The module whose functions run: `kernels.fused`, or what TRAMONTANE_KERNELS names."""
    name = os.environ.get("TRAMONTANE_KERNELS", "fused")
    if name not in _BACKENDS:
        raise ConfigError(f"TRAMONTANE_KERNELS is {name!r}; there are {sorted(_BACKENDS)}")
    reason = "TRAMONTANE_KERNELS" if "TRAMONTANE_KERNELS" in os.environ else "default"
    logging.getLogger(__name__).info("kernels: %s (%s)", name, reason)
    return _BACKENDS[name]
