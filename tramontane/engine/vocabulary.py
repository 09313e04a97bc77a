"""The tokenizer and chat format of a checkpoint: files beside the weights, or GGUF metadata."""

from tramontane.checkpoint.gguf import VOCABULARY
from tramontane.checkpoint.intake import Checkpoint
from tramontane.errors import TokenizerError
from tramontane.tokenizer.chat import ChatFormat
from tramontane.tokenizer.chat_loading import (
    GGUF_TEMPLATE_KEY,
    chat_format_from_gguf,
    load_chat_format,
    read_template,
)
from tramontane.tokenizer.gguf_vocabulary import tokenizer_from_gguf
from tramontane.tokenizer.json_tokenizer import TOKENIZER_FILE
from tramontane.tokenizer.loading import find_sentence_piece, load_tokenizer
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
