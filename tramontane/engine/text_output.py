"""Text of one answer as its tokens come: whole characters only, and never a stop text.

Text that may be the beginning of a stop text is held back until the next tokens decide.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class Decoder(Protocol):
    """What `tokenizer.stream.IncrementalDecoder` does."""

    def push(self, token_id: int) -> str:
        """The characters that the token completes."""
        ...

    def finish(self) -> str:
        """What is left of a character that never became whole."""
        ...


class Segment(NamedTuple):
    """Characters that the answer's token number `token_index` completed."""

    token_index: int
    text: str


class TextOutput:
    """Decodes an answer and looks for stop texts. `is_stopped` says that one was found."""

    def __init__(self, decoder: Decoder, *, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._decoder = decoder
        self._stop = stop
        self._held: deque[Segment] = deque()
        self._num_tokens = 0

    def push(self, token_id: int) -> list[Segment]:
        """Add a token; returns the text that is now certain to belong to the answer."""
        self._num_tokens += 1
        return self._add(self._decoder.push(token_id))

    def finish(self) -> list[Segment]:
        """The answer has ended: returns the rest of its text."""
        certain = self._add(self._decoder.finish())
        return certain + self._release(len(self._join_held()))

    def _add(self, text: str) -> list[Segment]:
        if self.is_stopped or not text:
            return []
        self._held.append(Segment(self._num_tokens - 1, text))
        held = self._join_held()
        found = [at for stop in self._stop if (at := held.find(stop)) >= 0]
        if not found:
            return self._release(len(held) - self._count_uncertain(held))
        self.is_stopped = True
        certain = self._release(min(found))
        self._held.clear()
        return certain

    def _join_held(self) -> str:
        return "".join(segment.text for segment in self._held)

    def _count_uncertain(self, held: str) -> int:
        """Length of the longest end of `held` that begins a stop text: "so En" and "End" give 2."""
        longest = max(map(len, self._stop), default=0) - 1
        for length in range(min(longest, len(held)), 0, -1):
            if any(stop.startswith(held[-length:]) for stop in self._stop):
                return length
        return 0

    def _release(self, count: int) -> list[Segment]:
        """Take the first `count` held characters, cutting the last segment where needed."""
        released = []
        while count:
            index, text = self._held.popleft()
            released.append(Segment(index, text[:count]))
            if len(text) > count:
                self._held.appendleft(Segment(index, text[count:]))
            count -= len(released[-1].text)
        return released
