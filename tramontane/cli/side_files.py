"""What goes along when a model is written anew: its tokenizer, chat template and defaults."""

from typing import TYPE_CHECKING

from tramontane.cli.notices import say

if TYPE_CHECKING:
    from tramontane.checkpoint.intake import Checkpoint
    from tramontane.tokenizer.tokenizer import Tokenizer

# Beside the tokenizer's own files, what belongs to a model whatever its layout.
_KEPT_FILES = ("generation_config.json", "training.json")


def load_model_tokenizer(checkpoint: "Checkpoint") -> "Tokenizer | None":
    """The model's tokenizer, if there is one; a note if not. CheckpointError if it does not fit."""
    from tramontane.engine.vocabulary import find_tokenizer, require_room

    tokenizer = find_tokenizer(checkpoint)
    if tokenizer is None:
        say(f"{checkpoint.contents.path} has no tokenizer: the copy has none either")
    else:
        require_room(tokenizer, checkpoint.config, origin=str(checkpoint.contents.path))
    return tokenizer


def find_side_files(checkpoint: "Checkpoint") -> dict[str, bytes]:
    """File name -> content, for a folder that has its tokenizer already.

    Raises ConfigError or CheckpointError, naming the file, if one is damaged.
    """
    from tramontane.checkpoint.files.json_file import read_json
    from tramontane.engine.generation_config import load_generation_config
    from tramontane.engine.vocabulary import find_side_file, find_template
    from tramontane.tokenizer.chat_loading import TEMPLATE_FILE

    found = {name: find_side_file(checkpoint, name) for name in _KEPT_FILES}
    load_generation_config(found[_KEPT_FILES[0]], eos_ids=frozenset())
    files = {}
    for name, path in found.items():
        if path is not None:
            read_json(path)
            files[name] = path.read_bytes()
    if (template := find_template(checkpoint)) is not None:
        files[TEMPLATE_FILE] = template.encode()
    return files
