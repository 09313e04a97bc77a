"""Vocabularies of SentencePiece's library: `tokenizer.model`, as Mistral publishes them."""

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from tramontane.errors import TokenizerError
from tramontane.tokenizer.json_tokenizer import TOKENIZER_CONFIG_FILE, decode_sentence_piece
from tramontane.tokenizer.model_proto import Piece, read_pieces
from tramontane.tokenizer.tokenizer import SPACE_MARK, Tokenizer

SENTENCE_PIECE_FILE = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece's BPE with bytes for characters that have no piece.

    What does not come back: U+2581, its mark for a space, decodes to a space; and a model whose
    normaliser changes text (Mistral's do not) gives the changed text.
    """

    def __init__(
        self, proto: bytes, *, origin: str = "tokenizer", unk_id: int | None = None,
        bos_id: int | None = None, eos_id: int | None = None,
    ) -> None:  # fmt: skip
        """`proto` is the content of a `tokenizer.model`; ids given go before those in it.

        Raises TokenizerError, naming `origin`.
        """
        self._backend = model = _load(proto, origin)
        ids = range(model.vocab_size())
        control = {model.id_to_piece(i): i for i in ids if model.is_control(i)}
        control |= {model.id_to_piece(i): i for i in ids if model.is_unknown(i)}
        chosen = [
            own if own is not None else stored
            for own, stored in [(unk_id, model.unk_id()), (bos_id, model.bos_id()),
                                (eos_id, model.eos_id())]
        ]  # fmt: skip
        _require_ids(chosen, len(ids), origin)
        control |= {model.id_to_piece(i): i for i in chosen}
        silent = set(control.values())
        pieces = [b"" if i in silent else decode_sentence_piece(model.id_to_piece(i)) for i in ids]
        super().__init__(pieces, control, unk_id=chosen[0], bos_id=chosen[1], eos_id=chosen[2])
        self.adds_prefix_space = model.normalize("a") == SPACE_MARK + "a"

    @classmethod
    def from_file(cls, path: str | Path) -> "SentencePieceTokenizer":
        """Reads a `tokenizer.model`. Raises TokenizerError."""
        try:
            proto = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(f"{path}: cannot read the tokenizer ({error})") from error
        return cls(proto, origin=str(path))

    def to_json(self) -> str:
        """Pieces, scores and types: tokenizers are the same exactly when this is equal."""
        ids = [self.unk_id, self.bos_id, self.eos_id, self.adds_prefix_space]
        return json.dumps([*ids, *self.list_pieces()])

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.model`, and beside it the names of the control tokens for transformers.

        transformers reads a `tokenizer.model` only where protobuf is installed.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / SENTENCE_PIECE_FILE).write_bytes(self._backend.serialized_model_proto())
        unk = "<unk>" if self.unk_id is None else self._backend.id_to_piece(self.unk_id)
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": unk,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "legacy": True,  # a space before every text, not before the first alone
            "clean_up_tokenization_spaces": False,
        }
        content = json.dumps(config, indent=2) + "\n"
        (target / TOKENIZER_CONFIG_FILE).write_text(content, encoding="utf-8")

    def describe_pieces(self) -> list[str]:
        """Each id's piece: U+2581 for a space, "<0x0A>" for a byte."""
        return [self._backend.id_to_piece(i) for i in range(self.vocab_size)]

    def list_pieces(self) -> list[Piece]:
        """Each id's piece with its score and its type."""
        return read_pieces(self._backend.serialized_model_proto())

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts))

    def _is_spaced(self, token_id: int) -> bool:
        return self._backend.id_to_piece(token_id).startswith(SPACE_MARK)


def _load(proto: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        model.encode("a")
    except (RuntimeError, ValueError) as error:
        raise TokenizerError(f"{origin} is not a SentencePiece model: {error}") from error
    return model


def _require_ids(ids: Sequence[int], vocab_size: int, origin: str) -> None:
    for name, token_id in zip(("unk", "bos", "eos"), ids, strict=True):
        if not 0 <= token_id < vocab_size:
            raise TokenizerError(
                f"{origin}: the id of {name} is {token_id}, but ids are 0..{vocab_size - 1}; "
                f"a model here needs one"
            )
