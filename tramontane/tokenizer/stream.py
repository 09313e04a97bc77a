"""Decoding of ids as they are generated: text comes out in whole characters only."""

import codecs

from tramontane.tokenizer.tokenizer import Tokenizer


class IncrementalDecoder:
    """Turns ids into text one by one; all pieces together equal `tokenizer.decode` of all ids.

    A token may end inside a character (an emoji is four bytes); its bytes wait for the rest.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes, possibly none. Raises TokenizerError."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """What is left, U+FFFD if the ids ended inside a character; then starts anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
