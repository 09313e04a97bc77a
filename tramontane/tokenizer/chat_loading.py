"""Which chat format a model folder or a GGUF file brings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tramontane.errors import TokenizerError
from tramontane.tokenizer.chat import ChatFormat
from tramontane.tokenizer.json_tokenizer import TOKENIZER_CONFIG_FILE, read_text
from tramontane.tokenizer.loading import find_sentence_piece
from tramontane.tokenizer.mistral_format import GGUF_VERSION_KEY, VERSIONS, MistralFormat
from tramontane.tokenizer.sentence_piece import read_format_version
from tramontane.tokenizer.template_format import TemplateFormat
from tramontane.tokenizer.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
GGUF_TEMPLATE_KEY = "tokenizer.chat_template"


def load_chat_format(path: str | Path, tokenizer: Tokenizer) -> ChatFormat | None:
    """The format of a model folder (or of the folder of a file), None for a base model.

    `chat_template.jinja` goes before the "chat_template" of `tokenizer_config.json`; without both,
    a SentencePiece file with Mistral's version in its name (`tokenizer.model.v3`) has that format.
    Raises TokenizerError, naming the file, if a template is unusable.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    source, origin = read_template(folder)
    if source is not None:
        return TemplateFormat(source, tokenizer, origin=str(origin))
    version = find_format_version(folder)
    return None if version is None else MistralFormat(version)


def find_format_version(folder: Path) -> int | None:
    """The version of Mistral's format that a file's name says. Raises TokenizerError if several."""
    file = find_sentence_piece(folder)
    version = None if file is None else read_format_version(file.name)
    return version if version in VERSIONS else None


def format_version_from_gguf(metadata: Mapping[str, Any]) -> int | None:
    """The version of Mistral's format that a GGUF says."""
    version = metadata.get(GGUF_VERSION_KEY)
    return version if version in VERSIONS else None


def chat_format_from_gguf(
    metadata: Mapping[str, Any], tokenizer: Tokenizer, *, origin: str
) -> ChatFormat | None:
    """The format of a GGUF file by its metadata, None for a base model. Raises TokenizerError.

    A template goes before the version of Mistral's format.
    """
    source = metadata.get(GGUF_TEMPLATE_KEY)
    if source is None:
        version = format_version_from_gguf(metadata)
        return None if version is None else MistralFormat(version)
    try:
        text = bytes(source).decode("utf-8") if isinstance(source, bytes | bytearray) else source
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{origin}: {GGUF_TEMPLATE_KEY} is not UTF-8 ({error})") from error
    return TemplateFormat(_require_text(text, origin), tokenizer, origin=origin)


def read_template(folder: Path) -> tuple[str | None, Path]:
    """The source of the folder's Jinja template, if it has one, and the file that was looked at.

    Raises TokenizerError, naming the file, if it cannot be read.
    """
    file = folder / TEMPLATE_FILE
    if file.is_file():
        return read_text(file), file
    file = folder / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        return None, file
    try:
        config = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not JSON ({error}): get the file again") from error
    template = config.get("chat_template") if isinstance(config, dict) else None
    return (None if template is None else _choose_template(template, str(file))), file


def _choose_template(template: object, origin: str) -> str:
    """A template, or the one named "default" of several."""
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        if "default" not in named:
            raise TokenizerError(
                f'{origin} names the chat templates {sorted(map(str, named))} and no "default"'
            )
        template = named["default"]
    return _require_text(template, origin)


def _require_text(template: object, origin: str) -> str:
    if not isinstance(template, str):
        raise TokenizerError(
            f"the chat template of {origin} is a {type(template).__name__}, not a text"
        )
    return template
