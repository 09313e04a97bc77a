"""Prompt lookup: where a text repeats itself, what came after the last time is guessed to come.

A guess runs along with the next token, in one pass, and each of its tokens counts only if the
sampler would have chosen the same: the answer never changes. Idea: Saxena, "Prompt Lookup
Decoding", 2023.

Worked example, phrases of 3: after "a b c d e a b c" the last three tokens came before, at the
start, and "d e a" followed: that is the guess.
"""

from collections.abc import Sequence

PHRASE = 3  # tokens that must have come before
_START = 4  # tokens of a first guess


class DraftSource:
    """Guesses the next tokens of a sequence: less after a wrong guess, more after a right one."""

    def __init__(self, max_num_drafts: int) -> None:
        self._max = max_num_drafts
        self._length = min(_START, max_num_drafts)
        self._next_of: dict[tuple[int, ...], int] = {}  # where a phrase was followed by what
        self._num_seen = 0
        self._num_to_skip = 0

    def propose(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow."""
        end = len(token_ids)
        for at in range(max(self._num_seen, PHRASE), end):
            self._next_of[tuple(token_ids[at - PHRASE : at])] = at
        self._num_seen = end
        if self._num_to_skip:
            self._num_to_skip -= 1
            return []
        found = self._next_of.get(tuple(token_ids[end - PHRASE :]))
        if found is None or limit <= 0:
            return []
        return list(token_ids[found : found + min(self._length, limit)])

    def learn(self, num_drafts: int, num_accepted: int) -> None:
        """Note how a guess went."""
        if num_accepted == num_drafts:
            self._length = min(self._max, self._length * 2)
        else:
            self._length = max(1, min(self._length, num_accepted + 1))
            if num_accepted == 0:
                self._num_to_skip = 4
