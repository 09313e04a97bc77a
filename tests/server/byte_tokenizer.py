"""A vocabulary of three control tokens and the 256 bytes."""

from collections.abc import Sequence
from pathlib import Path

from tramontane.tokenizer.tokenizer import CONTROL_TOKENS, Tokenizer


class ByteTokenizer(Tokenizer):
    def __init__(self) -> None:
        control = {name: i for i, name in enumerate(CONTROL_TOKENS)}
        token_bytes = [b"", b"", b"", *(bytes([i]) for i in range(256))]
        super().__init__(token_bytes, control, unk_id=0, bos_id=1, eos_id=2)

    def to_json(self) -> str:
        return "bytes"

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError

    def describe_pieces(self) -> list[str]:
        return [str(i) for i in range(self.vocab_size)]

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return [[3 + byte for byte in text.encode()] for text in texts]
