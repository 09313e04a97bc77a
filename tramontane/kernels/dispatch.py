"""Picks the implementation of each kernel, once, and says which and why.

`native` (C++, which leaves most of training, and GPUs, to `fused`) where the extension has been
built, else `fused` (torch with hand-written backward passes). `TRAMONTANE_KERNELS=reference` runs
the specification, for debugging and comparison.
"""

import logging
import os
from functools import cache
from types import ModuleType

from tramontane.errors import ConfigError
from tramontane.kernels import extension, fused, native, reference

_BACKENDS: dict[str, ModuleType] = {"native": native, "fused": fused, "reference": reference}


@cache
def get_kernels() -> ModuleType:
    """The module whose functions run: the fastest there is, or what TRAMONTANE_KERNELS names."""
    name = os.environ.get("TRAMONTANE_KERNELS")
    if name is None:
        name, reason = (
            ("native", "built") if extension.is_available() else ("fused", "no extension")
        )
    else:
        reason = "TRAMONTANE_KERNELS"
    if name not in _BACKENDS:
        raise ConfigError(f"TRAMONTANE_KERNELS is {name!r}; there are {sorted(_BACKENDS)}")
    if name == "native" and not extension.is_available():
        raise ConfigError("TRAMONTANE_KERNELS is 'native', but the extension has not been built")
    logging.getLogger(__name__).info("kernels: %s (%s)", name, reason)
    return _BACKENDS[name]
