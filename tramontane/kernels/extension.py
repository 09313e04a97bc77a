"""The extension module of csrc/, if it has been built: its instruction set, and what it takes.

One binary holds its kernels for AVX-512, AVX2 and any processor, and the best is chosen at run
time; TRAMONTANE_ISA=avx2 or portable chooses another. They share torch's threads.
"""

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from tramontane.errors import ConfigError

try:
    from tramontane.kernels import _native as native_kernels
except ImportError:  # not built, which `is_available` says
    native_kernels = None  # type: ignore[assignment]

TYPES = {torch.float32: 0, torch.bfloat16: 1}  # Type of csrc/kernels.h
_TORCH_LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib")  # what OpenMP they link, we use


def is_available() -> bool:
    """Whether the extension has been built."""
    return native_kernels is not None


def get_instruction_set() -> str:
    """The one whose kernels run: avx512_bf16, avx512, avx2 or portable."""
    return native_kernels.get_name()


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are contiguous bf16 or fp32 in the CPU's memory."""
    return all(t.dtype in TYPES and t.is_cpu and t.is_contiguous() for t in tensors)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether what comes of these is to be differentiated."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _set_up() -> None:
    """Choose the instruction set and find torch's threads."""
    if native_kernels is None:
        return
    name = os.environ.get("TRAMONTANE_ISA", "")
    if not native_kernels.choose_kernels(name):
        raise ConfigError(
            f"TRAMONTANE_ISA is {name!r}; this processor runs {get_instruction_set()}, and there "
            "are avx512_bf16, avx512, avx2 and portable"
        )
    folder = Path(torch.__file__).parent / "lib"
    if not any(native_kernels.use_openmp(str(folder / name)) for name in _TORCH_LIBRARIES):
        logging.getLogger(__name__).warning(
            "native kernels run on one thread: torch has no OpenMP that they can share"
        )


_set_up()
