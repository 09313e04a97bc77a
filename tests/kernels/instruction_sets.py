"""The instruction sets of the native kernels that this machine runs: tests see them all."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tramontane.kernels import extension

if not extension.is_available():
    pytest.skip("the native kernels have not been built", allow_module_level=True)

_BEST = extension.get_instruction_set()
INSTRUCTION_SETS = [name for name in ("avx512_bf16", "avx512", "avx2", "portable")
                    if extension.native_kernels.choose_kernels(name)]  # fmt: skip
extension.native_kernels.choose_kernels(_BEST)


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Until the end of the block."""
    assert extension.native_kernels.choose_kernels(name)
    try:
        yield
    finally:
        extension.native_kernels.choose_kernels(_BEST)
