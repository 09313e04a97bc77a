"""Settings of the C library and of oneDNN that a long run on a CPU gains from."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>


def keep_freed_memory() -> bool:
    """Let freed tensors be reused; True where the C library can be told so (glibc).

    Otherwise each large temporary is mapped, zeroed page by page, and unmapped again: up to a tenth
    of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
    trimmed = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    padded = mallopt(_M_TOP_PAD, 256 << 20)
    return mapped == trimmed == padded == 1


def keep_compiled_products() -> None:
    """Let oneDNN remember 4,096 compiled matrix products instead of 1,024.

    It compiles one for each shape, and experts have many row counts. Call before the first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "4096")
