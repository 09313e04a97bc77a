"""Which tokens run in the next pass: those that decode, then prompts in chunks, then new requests.

First come, first served, in turn among tenants. When the cache is full, the youngest sequence is
preempted: its blocks are taken, and it runs again from the start when there is room.
"""

import logging
from bisect import insort
from collections import OrderedDict, deque
from typing import NamedTuple

from tramontane.engine.block_manager import BlockManager
from tramontane.engine.sequence import Sequence
from tramontane.errors import CapacityError, EngineError, OverloadError, TramontaneError

_log = logging.getLogger(__name__)


class Share(NamedTuple):
    """How many of its next tokens a sequence runs in a pass, drafts included."""

    sequence: Sequence
    num_tokens: int


class RefusedError(Exception):
    """No blocks could be had for `sequence`; the cause says why. All other sequences stand."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(f"sequence {sequence.number}")
        self.sequence = sequence


class Scheduler:
    """Holds all unfinished sequences: `running` in the order they came, and those that wait."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int | None = None,
    ) -> None:
        assert 1 <= max_num_seqs <= max_num_batched_tokens, (max_num_seqs, max_num_batched_tokens)
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prefix_queries = self.num_prefix_hits = 0  # tokens of prompts
        self._blocks = blocks
        self._max_num_seqs, self._max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._max_waiting = max_waiting
        self._preempted: list[Sequence] = []  # ordered by arrival
        self._waiting: OrderedDict[str, deque[Sequence]] = OrderedDict()  # by tenant, next first
        self._num_waiting = 0
        self._num_added = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run now."""
        return self._num_waiting + len(self._preempted)

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self.running) + self.num_waiting

    def require_room(self, sequence: Sequence) -> None:
        """Raise CapacityError, naming both numbers, if a sequence could never run.

        Reads nothing that changes, and may be called from any thread.
        """
        needed, there = self._blocks.count_blocks(sequence.max_len), self._blocks.num_blocks
        if needed > there:
            size = self._blocks.block_size
            raise CapacityError(
                f"prompt and answer may take {sequence.max_len} tokens ({needed} blocks of {size}),"
                f" but the cache holds {there * size} ({there} blocks); lower max_tokens, shorten "
                "the prompt, or give the cache more memory"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises CapacityError if it could never run, and OverloadError if too many wait.
        """
        self.require_room(sequence)
        if self._max_waiting is not None and self.num_waiting >= self._max_waiting:
            raise OverloadError(
                f"{self.num_waiting} requests wait, which is as many as may; try again later"
            )
        self.enqueue(sequence)

    def enqueue(self, sequence: Sequence) -> None:
        """Queue a sequence that is known to fit."""
        self._number(sequence)
        self._waiting.setdefault(sequence.tenant, deque()).append(sequence)
        self._num_waiting += 1

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self._preempted:
            self._preempted.remove(sequence)
        elif sequence in self._waiting.get(sequence.tenant, ()):
            self._waiting[sequence.tenant].remove(sequence)
            self._forget_tenant_without_requests(sequence.tenant)
            self._num_waiting -= 1
        self._blocks.free(sequence)

    def fail(self, sequence: Sequence, cause: BaseException | None) -> list[Sequence]:
        """End a sequence, and siblings that have not begun, with an error; returns them.

        One that we had not thought of becomes an EngineError, and goes to the log.
        """
        self.remove(sequence)
        if sequence.is_finished:
            return []
        if isinstance(cause, TramontaneError):
            error = cause
        else:
            _log.error("a request failed", exc_info=cause)
            name = type(cause).__name__  # its text is not for callers
            error = EngineError(f"the engine failed at this request ({name}; see its log)")
            error.__cause__ = cause
        for raised in (error, error.__cause__):
            if raised is not None:
                raised.__traceback__ = None  # its frames hold the engine and more
        failed = [sequence, *sequence.take_siblings()]
        for one in failed:
            one.finish("error", error)
        return failed

    def fork(self, sequence: Sequence, child: Sequence) -> bool:
        """Let `child` go on beside a running sequence from what that has computed.

        If as many run as may, it waits instead, to compute all by itself: the answer is False.
        """
        if len(self.running) >= self._max_num_seqs:
            self.enqueue(child)
            return False
        self._number(child)
        self._blocks.fork(sequence, child)
        child.start(sequence.num_prompt_tokens)
        child.answer.inherit_prompt(sequence.answer)
        self.running.append(child)
        return True

    def schedule(self) -> list[Share]:
        """The next pass, at most `max_num_batched_tokens`; every block that it writes is reserved.

        Nobody is left out for ever: a sequence that decodes may take the blocks of younger ones,
        and if nothing else can run, so may a prompt.
        """
        shares: list[Share] = []
        room = self._max_num_batched_tokens
        num_preemptions = self.num_preemptions
        decoding = [s for s in self.running if s.num_pending_tokens == 1]
        for num_before, sequence in enumerate(decoding):
            # One that was preempted is younger than all before it.
            if sequence.is_running and self._make_room(sequence):
                num_tokens = 1 + self._fit_drafts(sequence, room - (len(decoding) - num_before))
                shares.append(Share(sequence, num_tokens))
                room -= num_tokens
        is_starved = False
        for sequence in [s for s in self.running if s.num_pending_tokens > 1]:
            if not sequence.is_running:
                continue
            num_tokens = self._fit(sequence, room)
            while num_tokens == 0 and room and not shares and self.running[-1] is not sequence:
                self._preempt(self.running[-1])
                num_tokens = self._fit(sequence, room)
            if num_tokens:
                self._reserve(sequence, num_tokens)
                shares.append(Share(sequence, num_tokens))
                room -= num_tokens
            is_starved |= num_tokens == 0
        if not is_starved and num_preemptions == self.num_preemptions:
            self._admit(shares, room)
        assert shares or not self.num_unfinished, (self.running, self.num_waiting)
        return shares

    def _admit(self, shares: list[Share], room: int) -> None:
        """Start those that wait, in their turn, while there is room for their whole prompt."""
        while room > 0 and len(self.running) < self._max_num_seqs:
            sequence = self._peek()
            if sequence is None or not self._start(sequence):
                return
            self._pop(sequence)
            num_tokens = self._fit(sequence, room)
            self._reserve(sequence, num_tokens)
            shares.append(Share(sequence, num_tokens))
            room -= num_tokens

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence what is kept of its prompt, if the rest would find room too."""
        try:
            num_kept = self._blocks.match_prefix(sequence)
        except Exception as error:  # the engine ends this sequence with it, whatever it is
            raise RefusedError(sequence) from error
        num_held = len(sequence.block_table) - sequence.num_freed_blocks
        others = self._blocks.count_blocks(len(sequence.token_ids)) - num_held  # at one time
        needed = min(others, self._blocks.count_missing(sequence, sequence.num_pending_tokens))
        spare = len(self.running)  # a block for the next token of each
        if needed + spare > self._blocks.num_free:
            self._blocks.free(sequence)
            return False
        if sequence.num_starts == 0 and sequence.cache_root is not None:
            self.num_prefix_queries += sequence.num_prompt_tokens
            self.num_prefix_hits += num_kept
        sequence.start(num_kept)
        return True

    def _make_room(self, sequence: Sequence) -> bool:
        """Reserve the next token's place, at the cost of the youngest; False if that is itself."""
        while not self._reserve(sequence, 1):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        try:
            return self._blocks.reserve(sequence, num_tokens)
        except Exception as error:  # the engine ends this sequence with it, whatever it is
            raise RefusedError(sequence) from error

    def _fit(self, sequence: Sequence, room: int) -> int:
        """How many of its tokens can run now."""
        return min(sequence.num_pending_tokens, room, self._blocks.count_room(sequence))

    def _fit_drafts(self, sequence: Sequence, room: int) -> int:
        """How many drafts run along with the next token, whose place is reserved; takes theirs."""
        if not sequence.draft_ids:
            return 0
        num_drafts = min(len(sequence.draft_ids), room, self._blocks.count_room(sequence) - 1)
        self._reserve(sequence, 1 + num_drafts)
        return num_drafts

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._blocks.free(sequence)
        sequence.preempt()
        self.num_preemptions += 1
        insort(self._preempted, sequence, key=_get_number)

    def _number(self, sequence: Sequence) -> None:
        sequence.number = self._num_added
        self._num_added += 1

    def _peek(self) -> Sequence | None:
        """The next to start: first those that ran before, then one of each tenant in turn."""
        if self._preempted:
            return self._preempted[0]
        return next(iter(self._waiting.values()))[0] if self._waiting else None

    def _pop(self, sequence: Sequence) -> None:
        """The sequence that `_peek` gave runs now."""
        if self._preempted:
            del self._preempted[0]
        else:
            self._waiting[sequence.tenant].popleft()
            self._waiting.move_to_end(sequence.tenant)
            self._forget_tenant_without_requests(sequence.tenant)
            self._num_waiting -= 1
        insort(self.running, sequence, key=_get_number)

    def _forget_tenant_without_requests(self, tenant: str) -> None:
        if not self._waiting[tenant]:
            del self._waiting[tenant]


def _get_number(sequence: Sequence) -> int:
    return sequence.number
