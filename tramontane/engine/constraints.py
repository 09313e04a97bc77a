"""Constraints at work: which tokens may come next, so that the answer is what was asked for.

compiler = ConstraintCompiler(tokenizer, eos_ids, vocab_size)
matcher = compiler.compile(Constraint("json_schema", '{"type": "integer"}'))
logits[~matcher.allowed_mask()] = -inf; ...; matcher.accept(token_id)
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from tramontane.engine import grammar_worker as worker
from tramontane.engine.constraint import Constraint
from tramontane.engine.grammar_process import GrammarHost, GrammarProcess, Reply
from tramontane.engine.grammar_source import describe_grammar
from tramontane.errors import OverloadError, RequestError
from tramontane.tokenizer.tokenizer import Tokenizer

COMPILE_SECONDS = 1.5
MAX_GRAMMARS = 64  # that answers follow at one time
MAX_CACHED = 16  # that are kept although no answer follows them
MAX_CACHED_BYTES = 48 * 2**20
MAX_COMPILING = 2  # at one time
_MAX_REFUSED = 256  # errors that are remembered


class Matcher:
    """Where one answer stands in its grammar. What goes wrong is a RequestError of this answer."""

    def __init__(self, process: GrammarProcess, session: int, vocab_size: int) -> None:
        self.is_exhausted = False  # whether nothing may follow
        self._process, self._session, self._vocab_size = process, session, vocab_size
        self._mask: Reply | None = None  # asked for ahead
        weakref.finalize(self, process.forget, session).atexit = False

    def allowed_mask(self) -> Tensor:
        """Which of the V ids may come next: bool (V,). Ends of text are among them where the
        answer may end. Raises RequestError.
        """
        if self._mask is None:
            [self._mask] = self._process.request(self._session, (worker.MASK, 0))
        bits = np.frombuffer(self._process.wait(self._mask).data, dtype=np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(mask.view(np.bool_))

    def accept(self, token_id: int) -> None:
        """Go on by a token. Raises RequestError if it is not allowed."""
        self._advance(worker.ACCEPT, token_id)

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens. Raises RequestError."""
        if count:
            self._advance(worker.ROLL_BACK, count)

    def copy(self) -> "Matcher":
        """Another answer that begins where this one stands."""
        session = self._process.open_session(parent=self._session)
        other = Matcher(self._process, session, self._vocab_size)
        other.is_exhausted, other._mask = self.is_exhausted, self._mask
        return other

    def _advance(self, operation: bytes, argument: int) -> None:
        """The next mask is computed while the model runs."""
        state, self._mask = self._process.request(
            self._session, (operation, argument), (worker.MASK, 0)
        )
        self.is_exhausted = self._process.wait(state).status == worker.EXHAUSTED


class ConstraintCompiler:
    """Compiles constraints for one vocabulary. May be used by several threads.

    A source is read and followed in a process of its own, which the kernel ends after 1.5 s of
    compiling, 0.5 s for a token, or with 64 MiB: neither a loop nor a stack overflow in the library
    reaches this process. What an attacker can still do: hold back the other answers of a batch by
    0.5 s, once for each request; keep two processors busy with compiling, while other new
    constraints wait and are then refused with OverloadError; take 64 MiB for each of MAX_GRAMMARS.

    `vocab_size` is the model's, V: ids beyond the tokenizer's are never allowed. Raises ConfigError
    without llguidance when the first constraint is compiled.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_ids: Iterable[int], vocab_size: int, *,
        compile_seconds: float = COMPILE_SECONDS,
    ) -> None:  # fmt: skip
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._eos_ids = sorted({i for i in eos_ids if i < vocab_size} or {tokenizer.eos_id})
        self._compile_seconds = compile_seconds
        self._host: GrammarHost | None = None
        self._lock = threading.Lock()
        self._compiling = threading.Semaphore(MAX_COMPILING)
        self._used: weakref.WeakValueDictionary[Constraint, GrammarProcess] = (
            weakref.WeakValueDictionary()
        )
        self._cached: OrderedDict[Constraint, GrammarProcess] = OrderedDict()
        self._refused: OrderedDict[Constraint, str] = OrderedDict()

    def compile(self, constraint: Constraint) -> Matcher:
        """The beginning of an answer; takes a few ms, or 1.5 s: not on the engine's own thread.

        Raises RequestError, which says what is wrong with the source, OverloadError if too much is
        being compiled or followed, and ConfigError without llguidance.
        """
        process = self._find(constraint) or self._compile(constraint)
        session = process.open_session()
        if not process.is_alive:  # it has ended while nobody looked
            process = self._compile(constraint)
            session = process.open_session()
        self._keep(constraint, process)
        return Matcher(process, session, self._vocab_size)

    def close(self) -> None:
        """End the processes that nobody needs any longer."""
        with self._lock:
            self._cached.clear()
            if self._host is not None:
                self._host.close()
                self._host = None

    def _find(self, constraint: Constraint) -> GrammarProcess | None:
        with self._lock:
            if constraint in self._refused:
                raise RequestError(self._refused[constraint])
            process = self._used.get(constraint)
            if process is not None and process.is_alive:
                return process
            if len(self._used) >= MAX_GRAMMARS + MAX_CACHED:
                raise OverloadError(
                    f"{len(self._used)} different constraints are in use, and no more may be; send "
                    f"the request again later"
                )
            return None

    def _compile(self, constraint: Constraint) -> GrammarProcess:
        task = describe_grammar(constraint)
        if not self._compiling.acquire(timeout=self._compile_seconds):
            raise OverloadError("other constraints are being compiled; send the request again")
        try:
            return self._start_host().start(
                task, name=constraint.kind, compile_seconds=self._compile_seconds
            )
        except RequestError as error:
            self._refuse(constraint, str(error))
            raise
        finally:
            self._compiling.release()

    def _start_host(self) -> GrammarHost:
        with self._lock:
            if self._host is None or not self._host.is_alive:
                tokens = _list_texts(self._tokenizer, self._vocab_size)
                self._host = GrammarHost(tokens, self._eos_ids)
            return self._host

    def _refuse(self, constraint: Constraint, message: str) -> None:
        with self._lock:
            self._refused[constraint] = message
            if len(self._refused) > _MAX_REFUSED:
                self._refused.popitem(last=False)

    def _keep(self, constraint: Constraint, process: GrammarProcess) -> None:
        """Keep the grammars that were used last, as far as the bounds allow."""
        with self._lock:
            self._used[constraint] = self._cached[constraint] = process
            self._cached.move_to_end(constraint)
            while len(self._cached) > 1 and (
                len(self._cached) > MAX_CACHED
                or sum(kept.num_bytes for kept in self._cached.values()) > MAX_CACHED_BYTES
            ):
                self._cached.popitem(last=False)


def _list_texts(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    """The bytes of each of V ids, none for control tokens and rows that fill up.

    Of ids that spell the same the last counts: SentencePiece has "<0x61>" and, later, "a", and
    writes the latter.
    """
    last: dict[bytes, int] = {}
    for token_id in range(min(tokenizer.vocab_size, vocab_size)):
        last[tokenizer.decode_bytes([token_id])] = token_id
    tokens = [b""] * vocab_size
    for token, token_id in last.items():
        tokens[token_id] = token
    return tokens
