"""Vocabularies of SentencePiece's library: `tokenizer.model`, as Mistral publishes them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from tramontane.errors import TokenizerError
from tramontane.tokenizer.json_tokenizer import (
    ADD_BOS_KEY,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    JsonTokenizer,
    decode_sentence_piece,
)
from tramontane.tokenizer.model_proto import Piece, read_pieces
from tramontane.tokenizer.sentence_piece_json import are_interchangeable, build_tokenizer_json
from tramontane.tokenizer.tokenizer import SPACE_MARK, Tokenizer

SENTENCE_PIECE_FILE = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece's BPE with bytes for characters that have no piece.

    What does not come back: U+2581, its mark for a space, decodes to a space; and a model whose
    normaliser changes text (Mistral's do not) gives the changed text. `format_version` is that of
    Mistral's chat format (mistral_format.py), where the name of the file says it.
    """

    def __init__(
        self, proto: bytes, *, origin: str = "tokenizer", unk_id: int | None = None,
        bos_id: int | None = None, eos_id: int | None = None, format_version: int | None = None,
    ) -> None:  # fmt: skip
        """`proto` is the content of a `tokenizer.model`; ids given go before those in it.

        Raises TokenizerError, naming `origin`.
        """
        self.format_version = format_version
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
        return cls(proto, origin=str(path), format_version=read_format_version(Path(path).name))

    def to_json(self) -> str:
        """Pieces, scores and types: tokenizers are the same exactly when this is equal."""
        ids = [self.unk_id, self.bos_id, self.eos_id, self.adds_prefix_space]
        return json.dumps([*ids, *self.list_pieces()])

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.model` (or `tokenizer.model.v3`), and for transformers a copy of it.

        transformers reads a `tokenizer.model` only where protobuf is installed, so there is a
        `tokenizer.json` beside it if that form can hold the vocabulary: a BPE with all 256 bytes
        that leaves texts as they are.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        version = "" if self.format_version is None else f".v{self.format_version}"
        proto = self._backend.serialized_model_proto()
        (target / f"{SENTENCE_PIECE_FILE}{version}").write_bytes(proto)
        copy = self._copy_as_json()
        if copy is not None:
            (target / TOKENIZER_FILE).write_text(copy + "\n", encoding="utf-8")
        config = {
            "tokenizer_class": "LlamaTokenizer" if copy is None else "PreTrainedTokenizerFast",
            "unk_token": self._name_unknown(),
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            ADD_BOS_KEY: self.adds_bos,
            "legacy": True,  # a space before every text, not before the first alone
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        content = json.dumps(config, indent=2) + "\n"
        (target / TOKENIZER_CONFIG_FILE).write_text(content, encoding="utf-8")

    def describe_pieces(self) -> list[str]:
        """Each id's piece: U+2581 for a space, "<0x0A>" for a byte."""
        return [self._backend.id_to_piece(i) for i in range(self.vocab_size)]

    def list_pieces(self) -> list[Piece]:
        """Each id's piece with its score and its type."""
        return read_pieces(self._backend.serialized_model_proto())

    def _copy_as_json(self) -> str | None:
        """The content of a `tokenizer.json` that gives the same ids, None if there is none."""
        unk_id = 0 if self.unk_id is None else self.unk_id
        content = build_tokenizer_json(
            self.list_pieces(),
            unk_id=unk_id,
            bos_id=self.bos_id if self.adds_bos else None,
            adds_prefix_space=self.adds_prefix_space,
        )
        names = {"unk_token": self._name_unknown(), "bos_token": self.bos_token,
                 "eos_token": self.eos_token}  # fmt: skip
        try:
            copy = JsonTokenizer.from_json(content, origin="the copy", names=names)
            return content if are_interchangeable(self, copy) else None
        except TokenizerError:  # an alphabet that this form does not take
            return None

    def _name_unknown(self) -> str:
        return "<unk>" if self.unk_id is None else self._backend.id_to_piece(self.unk_id)

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return self._backend.encode(list(texts))

    def _is_spaced(self, token_id: int) -> bool:
        return self._backend.id_to_piece(token_id).startswith(SPACE_MARK)


def read_format_version(name: str) -> int | None:
    """The 3 of `tokenizer.model.v3`, None for other names."""
    found = re.search(r"\.model\.v([0-9]+)$", name)
    return int(found[1]) if found else None


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
