"""Decoding of ids as they are generated: text comes out in whole characters only."""

import codecs

from tramontane.tokenizer.tokenizer import Tokenizer


class IncrementalDecoder:
    """Turns ids into text one by one; all pieces together are the text of all ids.

    A token may end inside a character (an emoji is four bytes); its bytes wait for the rest. With
    `starts_text` the ids are a text of their own, a chat's answer, and the pieces together equal
    `tokenizer.decode` of all ids. Without it they go on with a text, and SentencePiece's space
    before the first word is kept: it stands between prompt and answer.
    """

    def __init__(self, tokenizer: Tokenizer, *, starts_text: bool = False) -> None:
        self._tokenizer, self._starts_text = tokenizer, starts_text
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_at_start = starts_text

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, possibly none. Raises TokenizerError."""
        data = self._tokenizer.decode_bytes([token_id])
        if self._is_at_start and data:
            self._is_at_start = False
            data = data[self._tokenizer.starts_with_prefix_space([token_id]) :]
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left, U+FFFD if the ids ended inside a character; then starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        self._is_at_start = self._starts_text
        return rest
