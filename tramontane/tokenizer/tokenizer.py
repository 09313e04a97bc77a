"""What every tokenizer does: text to ids, ids to bytes. Its backends: json_tokenizer.py (the
`tokenizers` library), sentence_piece.py (SentencePiece); loading.py finds which one a folder has.

Control tokens are added by id alone: their names in a text ("</s>") are encoded as plain text.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from tramontane.errors import TokenizerError

UNK_TOKEN = "<unk>"
BOS_TOKEN = "<s>"
EOS_TOKEN = "</s>"
CONTROL_TOKENS = (UNK_TOKEN, BOS_TOKEN, EOS_TOKEN)  # ids 0, 1, 2, as in Mistral's vocabulary
SPACE_MARK = "\u2581"  # how SentencePiece writes a space within a piece


class Tokenizer(ABC):
    """A vocabulary. `bos_id` starts a text, `eos_id` ends it; `unk_id` is None where there is none.

    `control_ids` are the tokens no text spells, by name. No token has more than `max_token_bytes`.
    `adds_bos` is False where a model was
    trained on texts without `bos_id` (GGUF says so). SentencePiece puts a space before each text,
    so that a word is the same token wherever it stands: then `adds_prefix_space` is True, and
    `decode` takes that space away again.
    """

    adds_bos = True
    adds_prefix_space = False

    def __init__(
        self, token_bytes: Sequence[bytes], control_ids: Mapping[str, int], *,
        unk_id: int | None, bos_id: int, eos_id: int,
    ) -> None:  # fmt: skip
        """`token_bytes` holds the bytes of each id, none for a control token."""
        self.vocab_size = len(token_bytes)
        self.control_ids = dict(control_ids)
        self.unk_id, self.bos_id, self.eos_id = unk_id, bos_id, eos_id
        self.max_token_bytes = max([1, *map(len, token_bytes)])
        self._bytes_of_token = token_bytes
        self._never_text = frozenset(control_ids.values())

    @property
    def bos_token(self) -> str:
        """The name of `bos_id`, as templates write it."""
        return self._name_control(self.bos_id)

    @property
    def eos_token(self) -> str:
        """The name of `eos_id`."""
        return self._name_control(self.eos_id)

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
        return [self._require_text(ids) for ids in self._encode_texts(texts)]

    def encode_after_control(self, text: str) -> list[int]:
        """Token ids of `text` where a control token precedes it. Raises TokenizerError.

        As `encode`, but for vocabularies that put their space before the first text alone.
        """
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control tokens are silent, bytes that are no UTF-8 become U+FFFD.

        `decode(encode(text)) == text`, but for what a vocabulary itself does not tell apart:
        SentencePiece writes a space as U+2581, so a U+2581 in a text comes back as a space.
        """
        data = self.decode_bytes(ids)
        if self.starts_with_prefix_space(ids):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`, the prefix space included. Of parts: the parts of the bytes.

        Raises TokenizerError for an id outside the vocabulary.
        """
        if len(ids) and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise TokenizerError(
                f"token id {wrong} is outside the vocabulary (0..{self.vocab_size - 1})"
            )
        return b"".join([self._bytes_of_token[token_id] for token_id in ids])

    def starts_with_prefix_space(self, ids: Sequence[int]) -> bool:
        """Whether the first byte of `ids` is the space that `encode` puts before a text."""
        if not self.adds_prefix_space:
            return False
        first = next((i for i in ids if self._bytes_of_token[i]), None)
        return first is not None and self._is_spaced(first)

    @abstractmethod
    def to_json(self) -> str:
        """A description of the vocabulary: tokenizers are the same exactly when it is equal."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes into `folder` the files that `load_tokenizer` reads."""

    @abstractmethod
    def describe_pieces(self) -> list[str]:
        """Each id's piece as the vocabulary's file writes it."""

    @abstractmethod
    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]: ...

    def _is_spaced(self, token_id: int) -> bool:
        return self._bytes_of_token[token_id].startswith(b" ")

    def _name_control(self, token_id: int) -> str:
        return next(name for name, i in self.control_ids.items() if i == token_id)

    def _require_text(self, ids: list[int]) -> list[int]:
        """A last check that holds whatever a vocabulary's file says: text is never control."""
        if not self._never_text.isdisjoint(ids):
            wrong = next(i for i in ids if i in self._never_text)
            raise TokenizerError(
                f"this vocabulary can write a part of the text only as its control token "
                f"{self._name_control(wrong)!r}: remove that from the text"
            )
        return ids


def _require_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"character {error.start} of the text is the lone surrogate "
            f"{text[error.start]!a}, which has no UTF-8 form: remove it"
        ) from error
