"""Byte-level BPE behind a small interface: every string has ids, and they decode to that string.

Control tokens are added by id alone: their names in a text ("</s>") are encoded as plain text.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import tokenizers

from tramontane.errors import TokenizerError

UNK_TOKEN = "<unk>"
BOS_TOKEN = "<s>"
EOS_TOKEN = "</s>"
CONTROL_TOKENS = (UNK_TOKEN, BOS_TOKEN, EOS_TOKEN)  # ids 0, 1, 2, as in Mistral's vocabulary
TOKENIZER_FILE = "tokenizer.json"

_SPECIAL_TOKENS_MAP = {"unk_token": UNK_TOKEN, "bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN}
_TRANSFORMERS_CONFIG = _SPECIAL_TOKENS_MAP | {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
    # Control-token names in a text stay plain text in transformers too.
    "split_special_tokens": True,
}


class Tokenizer:
    """A byte-level BPE vocabulary. `bos_id` starts a text, `eos_id` ends it."""

    def __init__(self, backend: tokenizers.Tokenizer, *, origin: str = "tokenizer") -> None:
        """Wraps `backend`; `origin` names it in errors. Raises TokenizerError."""
        _require_byte_level(backend, origin)
        # Names of control tokens in a text are text; tokenizer.json does not keep this setting.
        backend.encode_special_tokens = True
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size()
        self.unk_id, self.bos_id, self.eos_id = (
            _control_id(backend, name, origin) for name in CONTROL_TOKENS
        )
        self._bytes_of_token = _list_token_bytes(backend, origin)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a `tokenizer.json`. Raises TokenizerError if there is none of byte-level BPE."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: cannot read the tokenizer ({error})") from error
        return cls(_parse_backend(text, origin=str(path)), origin=str(path))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Reads `tokenizer.json` of a model folder. Raises TokenizerError."""
        path = Path(folder) / TOKENIZER_FILE
        if not path.is_file():
            raise TokenizerError(
                f"{folder} holds no {TOKENIZER_FILE}: name a model folder, or make one with "
                f"`tramontane tokenizer train`"
            )
        return cls.from_file(path)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, whose ids never include a control token but the ones asked for.

        Raises TokenizerError for a lone surrogate, which no UTF-8 text can hold.
        """
        ids = self.encode_batch([text])[0]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, no control tokens, on all processors. Raises TokenizerError."""
        for text in texts:
            _require_encodable(text)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens are silent, bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`. Raises TokenizerError for an id outside the vocabulary."""
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise TokenizerError(
                f"token id {wrong} is outside the vocabulary (0..{self.vocab_size - 1})"
            )
        return b"".join([self._bytes_of_token[token_id] for token_id in ids])

    def to_json(self) -> str:
        """The content of `tokenizer.json`: tokenizers are the same exactly when this is equal."""
        return self._backend.to_str(pretty=True)

    def save(self, folder: str | Path) -> None:
        """Writes into `folder` what `transformers.AutoTokenizer` needs to give equal ids."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        files = {
            TOKENIZER_FILE: self.to_json(),
            "tokenizer_config.json": json.dumps(_TRANSFORMERS_CONFIG, indent=2),
            "special_tokens_map.json": json.dumps(_SPECIAL_TOKENS_MAP, indent=2),
        }
        for name, content in files.items():
            (target / name).write_text(content + "\n", encoding="utf-8")


def _parse_backend(text: str, *, origin: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing more specific than Exception
        raise TokenizerError(f"{origin} is not a tokenizer.json: {error}") from error


def _require_byte_level(backend: tokenizers.Tokenizer, origin: str) -> None:
    model, decoder = type(backend.model).__name__, type(backend.decoder).__name__
    if (model, decoder) != ("BPE", "ByteLevel"):
        raise TokenizerError(
            f"{origin} has model {model} and decoder {decoder}; only byte-level BPE "
            f"(BPE and ByteLevel) is supported"
        )


def _control_id(backend: tokenizers.Tokenizer, name: str, origin: str) -> int:
    token_id = backend.token_to_id(name)
    if token_id is None:
        raise TokenizerError(f"{origin} lacks the control token {name!r}")
    return token_id


def _require_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text is the lone surrogate "
            f"{text[error.start]!a}, which has no UTF-8 form: remove it"
        ) from error


def _list_token_bytes(backend: tokenizers.Tokenizer, origin: str) -> list[bytes]:
    """The bytes of each id; a control token has none, an added one those of its content."""
    added = backend.get_added_tokens_decoder()
    byte_of = _map_characters_to_bytes()
    token_bytes = [b""] * backend.get_vocab_size()
    try:
        for piece, token_id in backend.get_vocab(with_added_tokens=False).items():
            if token_id not in added:
                token_bytes[token_id] = bytes(byte_of[character] for character in piece)
        for token_id, token in added.items():
            token_bytes[token_id] = b"" if token.special else token.content.encode("utf-8")
    except (KeyError, IndexError) as error:
        raise TokenizerError(f"{origin} has ids with gaps, or pieces that are not bytes") from error
    return token_bytes


def _map_characters_to_bytes() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte is its own character, the other 68 follow U+00FF."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(hidden)}
