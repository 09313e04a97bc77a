"""What lies at a path: the layout that can read it, or a refusal that says why.

Pickled weights (.bin, .pt, .pth) are refused by name: unpickling runs whatever code they hold.
"""

from pathlib import Path

from tramontane.atomic import find_previous
from tramontane.checkpoint.hf import HUGGING_FACE
from tramontane.checkpoint.layout import Layout
from tramontane.errors import CheckpointError

# Asked in this order; the first that recognises the path reads it.
LAYOUTS: tuple[Layout, ...] = (HUGGING_FACE,)
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


def find_layout(path: Path) -> Layout:
    """The layout of the checkpoint at `path`. Raises CheckpointError if there is none."""
    if not path.exists():
        previous = find_previous(path.absolute())
        remedy = f"; a killed save left its previous version at {previous}" if previous else ""
        raise CheckpointError(f"{path} does not exist; looked for {_describe_layouts()}{remedy}")
    for layout in LAYOUTS:
        if layout.is_at(path):
            return layout
    if pickles := _find_pickles(path):
        raise CheckpointError(
            f"{pickles[0]} is a pickle, which can run code when it is read; tramontane reads "
            "safetensors only: convert it first (transformers: save_pretrained)"
        )
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; name the folder with {_describe_layouts()}")
    found = sorted(entry.name for entry in path.iterdir())[:8]
    raise CheckpointError(
        f"{path} has no weights: looked for {_describe_layouts()}, "
        f"found {found if found else 'an empty folder'}"
    )


def _describe_layouts() -> str:
    return ", or ".join(f"{layout.looks_for} ({layout.name})" for layout in LAYOUTS)


def _find_pickles(path: Path) -> list[Path]:
    candidates = sorted(path.iterdir()) if path.is_dir() else [path]
    return [entry for entry in candidates if entry.suffix in _PICKLE_SUFFIXES]
