"""Text of one answer as its tokens come: whole characters only, and never a stop text.

Text that may be the beginning of a stop text is held back until the next tokens decide.
"""

from collections import deque
from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What `tokenizer.stream.IncrementalDecoder` does."""

    def push(self, token_id: int) -> str:
        """The characters that the token completes."""
        ...

    def finish(self) -> str:
        """What is left of a character that never became whole."""
        ...


class TextOutput:
    """Decodes an answer and looks for stop texts; `found_stop` is the one that ended it.

    Gives back a text for each token, in their order, once it is certain; with `include_stop` the
    stop text belongs to the answer. In the first `min_tokens` tokens none is looked for.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.found_stop: str | None = None
        self._decoder = decoder
        self._stop, self._include_stop = stop, include_stop
        self._longest = max(map(len, stop), default=0)
        self._num_unsearched = min_tokens
        self._held: deque[str] = deque()  # the text of each token that is not certain

    @property
    def is_stopped(self) -> bool:
        """Whether a stop text came."""
        return self.found_stop is not None

    def push(self, token_id: int) -> list[str]:
        """Add a token; returns the texts of the next tokens that have become certain."""
        assert not self.is_stopped, self.found_stop
        text = self._decoder.push(token_id)
        if self._num_unsearched > 0:
            self._num_unsearched -= 1
            return [text]
        return self._add(text)

    def finish(self) -> list[str]:
        """The answer has ended: returns the texts of all tokens that were held back.

        What was left of a last character goes to the last of them, or stands alone.
        """
        rest = "" if self.is_stopped else self._decoder.finish()
        certain = []
        if rest:
            before = self._held.pop() if self._held else ""
            certain = self._add(before + rest)
        certain += self._held
        self._held.clear()
        return certain

    def _add(self, text: str) -> list[str]:
        if not self._stop:
            return [text]
        self._held.append(text)
        joined = "".join(self._held)
        found = [(at, stop) for stop in self._stop if (at := joined.find(stop)) >= 0]
        if found:
            at, self.found_stop = min(found)
            return self._cut(at + (len(self.found_stop) if self._include_stop else 0))
        return self._release(len(joined) - self._count_uncertain(joined))

    def _count_uncertain(self, joined: str) -> int:
        """Length of the longest end that begins a stop text: "so En" and "End" give 2."""
        for length in range(min(self._longest - 1, len(joined)), 0, -1):
            if any(stop.startswith(joined[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, count: int) -> list[str]:
        """The tokens whose text lies wholly within the first `count` characters held."""
        certain = []
        while self._held and len(self._held[0]) <= count:
            certain.append(self._held.popleft())
            count -= len(certain[-1])
        return certain

    def _cut(self, count: int) -> list[str]:
        """All tokens; of their text only the first `count` characters."""
        texts = []
        for text in self._held:
            texts.append(text[:count])
            count -= len(texts[-1])
        self._held.clear()
        return texts
