"""Which tokenizer a model folder or file has, recognised by what is there."""

from pathlib import Path

from tramontane.errors import TokenizerError
from tramontane.tokenizer.json_tokenizer import TOKENIZER_FILE, JsonTokenizer
from tramontane.tokenizer.sentence_piece import SENTENCE_PIECE_FILE, SentencePieceTokenizer
from tramontane.tokenizer.tokenizer import Tokenizer

_TEKKEN_FILE = "tekken.json"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, or of one of its tokenizer files.

    A folder's `tokenizer.json` goes before its `tokenizer.model` (or `tokenizer.model.v3`, as
    Mistral numbers its later vocabularies). Raises TokenizerError naming file and remedy.
    """
    path = Path(path)
    file = _find_file(path) if path.is_dir() else path
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
