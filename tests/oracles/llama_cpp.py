"""llama.cpp as the oracle of our GGUF files; its Python binding is built from source by who tests.

pip install llama-cpp-python==0.3.36 -c constraints.txt
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


class LlamaCpp:
    """One model in llama.cpp, on the CPU, one sequence."""

    def __init__(self, path: Path) -> None:
        self._llama = llama_cpp.Llama(
            str(path), n_ctx=256, n_threads=2, logits_all=True, verbose=False, use_mmap=True
        )

    def tokenize(self, text: str) -> list[int]:
        """Ids of plain text, without BOS."""
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=False, special=False)
        return ids

    def compute_logits(self, ids: Sequence[int]) -> np.ndarray:
        """(T, V), from an empty cache."""
        self._llama.reset()
        self._llama.eval(list(ids))
        return np.array(self._llama.scores[: len(ids)])
