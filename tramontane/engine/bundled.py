"""Where the model that comes with the package lies."""

from pathlib import Path

from tramontane.errors import CheckpointError

BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "assets"


def is_bundled_model_there() -> bool:
    """Whether configuration, weights and tokenizer are all there."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return all((BUNDLED_MODEL / name).is_file() for name in names)


def find_bundled_model() -> Path:
    """The folder of the bundled model. Raises CheckpointError if this copy came without it."""
    if not is_bundled_model_there():
        raise CheckpointError(
            f"this copy of tramontane holds no bundled model (looked in {BUNDLED_MODEL}); name a "
            "model folder instead, for example: tramontane run FOLDER"
        )
    return BUNDLED_MODEL
