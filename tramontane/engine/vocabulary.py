"""The tokenizer and chat format of a checkpoint: files beside the weights, or GGUF metadata."""

from pathlib import Path

from tramontane.checkpoint.files.json_file import read_json
from tramontane.checkpoint.gguf import VOCABULARY
from tramontane.checkpoint.hf import CONFIG_FILE
from tramontane.checkpoint.intake import Checkpoint
from tramontane.config import ModelConfig
from tramontane.engine.generation_config import FILE_NAME, read_token_ids
from tramontane.errors import CheckpointError, TokenizerError
from tramontane.tokenizer.chat import ChatFormat
from tramontane.tokenizer.chat_loading import (
    GGUF_TEMPLATE_KEY,
    TEMPLATE_FILE,
    chat_format_from_gguf,
    find_format_version,
    format_version_from_gguf,
    load_chat_format,
    read_template,
)
from tramontane.tokenizer.gguf_vocabulary import EOT_KEY, GGML_PREFIX, tokenizer_from_gguf
from tramontane.tokenizer.json_tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from tramontane.tokenizer.loading import find_sentence_piece, load_tokenizer
from tramontane.tokenizer.mistral_format import GGUF_VERSION_KEY
from tramontane.tokenizer.tokenizer import Tokenizer


def find_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """The checkpoint's tokenizer, None if it has none. Raises TokenizerError if it is unusable."""
    contents = checkpoint.contents
    if VOCABULARY in contents.metadata:
        return tokenizer_from_gguf(contents.metadata, origin=str(contents.path))
    folder = contents.folder
    has_files = (folder / TOKENIZER_FILE).is_file() or find_sentence_piece(folder) is not None
    return load_tokenizer(folder) if has_files else None


def find_template(checkpoint: Checkpoint) -> str | None:
    """The source of the chat template that came with the checkpoint. Raises TokenizerError."""
    contents = checkpoint.contents
    if contents.container == "gguf":
        source = contents.metadata.get(GGUF_TEMPLATE_KEY)
        return source if isinstance(source, str) else None
    return read_template(contents.folder)[0]


def find_chat_format(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatFormat | None:
    """The checkpoint's chat format, None for a base model. Raises TokenizerError."""
    contents = checkpoint.contents
    if contents.container == "gguf":
        return chat_format_from_gguf(contents.metadata, tokenizer, origin=str(contents.path))
    return load_chat_format(contents.folder, tokenizer)


def require_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """`find_tokenizer`, or a TokenizerError that says what was looked for."""
    tokenizer = find_tokenizer(checkpoint)
    if tokenizer is None:
        raise TokenizerError(
            f"{checkpoint.contents.path} has weights but no tokenizer: looked for tokenizer.json "
            f"and tokenizer.model in {checkpoint.contents.folder}"
        )
    return tokenizer


def require_chat_format(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatFormat:
    """`find_chat_format`, or a TokenizerError that says what was looked for."""
    chat_format = find_chat_format(checkpoint, tokenizer)
    if chat_format is None:
        contents = checkpoint.contents
        where = (
            f"{GGUF_TEMPLATE_KEY} and {GGUF_VERSION_KEY} in its metadata"
            if contents.container == "gguf"
            else f"{TEMPLATE_FILE}, the chat_template of {TOKENIZER_CONFIG_FILE} and a "
            f"tokenizer.model.v1, .v2 or .v3 in {contents.folder}"
        )
        raise TokenizerError(f"{contents.path} has no chat format: looked for {where}")
    return chat_format


def require_room(tokenizer: Tokenizer, config: ModelConfig, *, origin: str) -> None:
    """Raise CheckpointError if the model has fewer rows than the vocabulary has tokens."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{origin}: the tokenizer has {tokenizer.vocab_size} tokens, but the model "
            f"{config.vocab_size}; they do not belong together"
        )


def find_mistral_version(checkpoint: Checkpoint) -> int | None:
    """The version of Mistral's chat format that came with the checkpoint, if it says one."""
    contents = checkpoint.contents
    if contents.container == "gguf":
        return format_version_from_gguf(contents.metadata)
    return find_format_version(contents.folder)


def find_side_file(checkpoint: Checkpoint, name: str) -> Path | None:
    """A file of the model beside its weights, such as generation_config.json.

    A GGUF that is named by itself is the whole model: what lies beside it may be another's.
    """
    contents = checkpoint.contents
    is_alone = contents.container == "gguf" and not contents.path.is_dir()
    path = contents.folder / name
    return path if path.is_file() and not is_alone else None


def find_eos_ids(checkpoint: Checkpoint, eos_id: int) -> list[int]:
    """The ids that end an answer where generation_config.json names no others.

    The vocabulary's `eos_id`, and the end of a turn, if it is a token, that a GGUF may tell apart.
    """
    turn = checkpoint.contents.metadata.get(EOT_KEY)
    if not isinstance(turn, int) or not 0 <= turn < checkpoint.config.vocab_size:
        return [eos_id]
    return list(dict.fromkeys([eos_id, turn]))


def find_token_ids(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None
) -> dict[str, int | list[int]]:
    """bos_token_id and eos_token_id, as config.json has them.

    The tokenizer knows them; without one it is what the checkpoint's own files say, perhaps none.
    Raises ConfigError on what is no id.
    """
    found: dict[str, int | list[int]] = {}
    if tokenizer is not None:
        found = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    else:
        for name in (FILE_NAME, CONFIG_FILE):
            if path := find_side_file(checkpoint, name):
                found |= read_token_ids(read_json(path), origin=str(path))
        metadata = {
            key.removeprefix(GGML_PREFIX): value
            for key, value in checkpoint.contents.metadata.items()
        }
        found |= read_token_ids(metadata, origin=str(checkpoint.contents.path))
    eos = found.get("eos_token_id")
    if isinstance(eos, int) and len(ids := find_eos_ids(checkpoint, eos)) > 1:
        found["eos_token_id"] = ids
    return found
