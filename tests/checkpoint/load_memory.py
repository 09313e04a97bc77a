"""What memory loading takes beyond the model, and what of its own; run as a program: PATH DTYPE."""

import json
import sys
from pathlib import Path

import torch

from tests.checkpoint.peak_memory import read_memory, read_peak
from tests.model_folder import save_tiny_model
from tramontane.checkpoint.loader import load_model


def main() -> None:
    path, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
    load_model(save_tiny_model(path.parent / "tiny"))  # what the first load of a process imports
    start, own = read_peak(), read_memory("RssAnon")
    model = load_model(path, dtype=dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters()) // 1024
    beyond = read_peak() - start - size
    print(json.dumps({"model": size, "beyond": beyond, "own": read_memory("RssAnon") - own}))


if __name__ == "__main__":
    main()
