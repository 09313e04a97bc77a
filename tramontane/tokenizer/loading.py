"""Which tokenizer a model folder or file has, recognised by what is there."""

from pathlib import Path

from tramontane.errors import TokenizerError
from tramontane.tokenizer.json_tokenizer import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    JsonTokenizer,
    read_adds_bos,
)
from tramontane.tokenizer.sentence_piece import SENTENCE_PIECE_FILE, SentencePieceTokenizer
from tramontane.tokenizer.sentence_piece_json import are_interchangeable
from tramontane.tokenizer.tokenizer import Tokenizer

_TEKKEN_FILE = "tekken.json"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, or of one of its tokenizer files.

    A folder's `tokenizer.json` goes before its `tokenizer.model` (or `tokenizer.model.v3`, as
    Mistral numbers its later vocabularies), unless both hold the same: then SentencePiece's own
    code gives the ids. Raises TokenizerError naming file and remedy.
    """
    path = Path(path)
    if not path.is_dir():
        return _load_file(path)
    tokenizer = _load_file(_find_file(path))
    if isinstance(tokenizer, JsonTokenizer):
        tokenizer = _find_original(tokenizer, path) or tokenizer
    tokenizer.adds_bos = read_adds_bos(path / TOKENIZER_CONFIG_FILE)
    return tokenizer


def _load_file(file: Path) -> Tokenizer:
    if file.name == _TEKKEN_FILE:
        raise TokenizerError(
            f"{file} is a Tekken vocabulary, which no Mixtral has and this does not read: "
            f"use the folder's {TOKENIZER_FILE}, or convert it to one with transformers"
        )
    if _is_json(file):
        return JsonTokenizer.from_file(file)
    return SentencePieceTokenizer.from_file(file)


def find_sentence_piece(folder: Path) -> Path | None:
    """`tokenizer.model`, or else the one numbered file beside it. Raises TokenizerError."""
    plain = folder / SENTENCE_PIECE_FILE
    numbered = sorted(folder.glob("*.model.v[0-9]*"))
    if plain.is_file() or not numbered:
        return plain if plain.is_file() else None
    if len(numbered) > 1:
        names = ", ".join(file.name for file in numbered)
        raise TokenizerError(f"{folder} holds {names}: name the one to use")
    return numbered[0]


def _find_original(copy: JsonTokenizer, folder: Path) -> SentencePieceTokenizer | None:
    """The folder's SentencePiece model, if its `tokenizer.json` is a copy of that.

    Any other file of such a name is not what the folder's makers mean: an older vocabulary, to
    which they have added tokens, or one of another kind.
    """
    try:
        file = find_sentence_piece(folder)
        original = None if file is None else SentencePieceTokenizer.from_file(file)
    except TokenizerError:
        return None
    return original if original and are_interchangeable(copy, original) else None


def _find_file(folder: Path) -> Path:
    if (folder / TOKENIZER_FILE).is_file():
        return folder / TOKENIZER_FILE
    if found := find_sentence_piece(folder):
        return found
    if (folder / _TEKKEN_FILE).is_file():
        return folder / _TEKKEN_FILE
    raise TokenizerError(
        f"{folder} holds no {TOKENIZER_FILE} and no {SENTENCE_PIECE_FILE}: name a model folder, "
        f"or make one with `tramontane tokenizer train`"
    )


def _is_json(file: Path) -> bool:
    """By content: a JSON object starts with a brace, a SentencePiece model with a line end."""
    try:
        with open(file, "rb") as stream:
            start = stream.read(64).lstrip(b" \t\r\n\xef\xbb\xbf")
    except OSError as error:
        raise TokenizerError(f"{file}: cannot read the tokenizer ({error})") from error
    return start.startswith(b"{") or file.suffix == ".json"
