"""The program that matches answers against grammars with llguidance, one process for each grammar.

llguidance's own limits bound neither its time nor its memory nor its stack, so it runs where the
kernel ends what takes too much of them. grammar_process.py starts this file, with a socket as
standard input: over it come the vocabulary (READY goes back) and a socket for each grammar. Over
such a one come the task, in JSON, and after its REPLY one REQUEST after another.
"""

import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
from typing import Any

REQUEST = struct.Struct("<cII")  # operation, session, argument
REPLY = struct.Struct("<BII")  # status, KiB that the process has grown by, bytes that follow
LENGTH = struct.Struct("<I")  # before what has no fixed size
# The second line is replied to, in the order of the requests.
OPEN, COPY, CLOSE = b"o", b"c", b"x"
ACCEPT, ROLL_BACK, MASK = b"a", b"r", b"m"
GOES_ON, EXHAUSTED, FAILED = range(3)
READY = b"1"  # said once, when the vocabulary is there

# More than llguidance's own 2000, which an object of 500 optional properties exceeds.
_MAX_ITEMS_IN_ROW = 10_000


def receive(connection: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises EOFError if the other side ends before."""
    data = bytearray(size)
    view, start = memoryview(data), 0
    while start < size:
        count = connection.recv_into(view[start:])
        if not count:
            raise EOFError("the other side has ended")
        start += count
    return bytes(data)


def receive_sized(connection: socket.socket) -> bytes:
    """What `send_sized` sent. Raises EOFError."""
    return receive(connection, LENGTH.unpack(receive(connection, LENGTH.size))[0])


def send_sized(connection: socket.socket, data: bytes) -> None:
    """Send bytes with their number before them."""
    connection.sendall(LENGTH.pack(len(data)) + data)


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of each id (none: not a text), and the ids of
    a text that the grammar forces: the longest token first.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes], eos_ids: list[int]) -> None:
        self.tokens, self.eos_token_id = tokens, eos_ids[0]
        self.library: Any = None

    def __call__(self, text: str) -> list[int]:
        return self.library.greedy_tokenize(text)


class _Session:
    """The state of one answer. `library` is llguidance's matcher."""

    def __init__(self, library: Any, eos_ids: frozenset[int], num_ends: int = 0) -> None:
        self.library, self._eos_ids = library, eos_ids
        self._num_ends = num_ends  # ends of text after the grammar's end, which it does not count

    def copy(self) -> "_Session":
        return _Session(self.library.deep_copy(), self._eos_ids, self._num_ends)

    def accept(self, token_id: int) -> bool:
        if self.library.is_stopped() and token_id in self._eos_ids:
            self._num_ends += 1
            return True
        return self.library.consume_token(token_id)

    def roll_back(self, count: int) -> bool:
        ends = min(count, self._num_ends)
        self._num_ends -= ends
        return self.library.rollback(count - ends)


class _Grammar:
    """A compiled grammar and the answers that follow it."""

    def __init__(self, task: dict[str, Any], tokenizer: Any, texts: int) -> None:
        """`texts` has a bit for each id that may ever be chosen."""
        self._tokenizer, self._texts = tokenizer, texts
        self._eos_ids = frozenset(tokenizer.eos_tokens)
        self._root = _Session(_compile(task, tokenizer), self._eos_ids)
        self._sessions: dict[int, _Session] = {}

    def check(self) -> tuple[int, bytes]:
        """GOES_ON if an answer can begin, else FAILED and why not."""
        if self._root.library.is_error():
            return FAILED, self._root.library.get_error().encode()
        status, data = self._compute_mask(self._root.copy())
        if status == GOES_ON:
            return GOES_ON, b""
        return FAILED, b"nothing fits it" if data.startswith(b"NoExtension") else data

    def serve(self, operation: bytes, name: int, argument: int) -> tuple[int, bytes] | None:
        """Does what is asked; None where nothing is to be said."""
        if operation == OPEN:
            self._sessions[name] = self._root.copy()
            return None
        if operation == COPY:
            self._sessions[argument] = self._sessions[name].copy()
            return None
        if operation == CLOSE:
            del self._sessions[name]
            return None
        session = self._sessions[name]
        if operation == MASK:
            return self._compute_mask(session)
        is_done = (session.accept if operation == ACCEPT else session.roll_back)(argument)
        if not is_done or session.library.is_error():
            return FAILED, session.library.get_error().encode()
        return EXHAUSTED if session.library.is_stopped() else GOES_ON, b""

    def _compute_mask(self, session: _Session) -> tuple[int, bytes]:
        """One bit for each id, the first in the lowest place."""
        mask = session.library.compute_bitmask()
        if session.library.is_error():
            return FAILED, session.library.get_error().encode()
        allowed = int.from_bytes(mask, "little") & self._texts
        if not allowed:
            return FAILED, b"it allows only tokens that are not text"
        return GOES_ON, allowed.to_bytes(len(mask), "little")


def _compile(task: dict[str, Any], tokenizer: Any) -> Any:
    import llguidance

    limits = llguidance.LLParserLimits(max_items_in_row=_MAX_ITEMS_IN_ROW, verbose_errors=False)
    if "regex" in task:
        grammar = llguidance.LLMatcher.grammar_from_regex(task["regex"])
    else:
        grammar = json.dumps({"grammars": [task["grammar"]]})
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def _serve(connection: socket.socket, tokenizer: Any, texts: int) -> None:
    """One grammar: compile it, then answer requests until the other side ends."""
    task = json.loads(receive_sized(connection))
    step_seconds = task["step_seconds"]
    _limit_memory(task["memory"])
    base = _count_kib()
    signal.setitimer(signal.ITIMER_REAL, task["compile_seconds"])  # SIGALRM ends a process
    grammar = _Grammar(task, tokenizer, texts)
    reply: tuple[int, bytes] | None = grammar.check()
    while True:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if reply is not None:
            status, data = reply
            header = REPLY.pack(status, _count_kib() - base, len(data))
            connection.sendall(header + data)
        operation, name, argument = REQUEST.unpack(receive(connection, REQUEST.size))
        signal.setitimer(signal.ITIMER_REAL, step_seconds)
        reply = grammar.serve(operation, name, argument)


def _count_kib() -> int:
    """The most memory that this process has had, in KiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size // 1024 if sys.platform == "darwin" else size


def _limit_memory(allowed: int) -> None:
    """Let this process take so many bytes more; where there is no /proc, time alone is bounded."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not os.path.exists("/proc/self/statm"):
        return
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[5])
    limit = pages * resource.getpagesize() + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _build_tokenizer(control: socket.socket) -> tuple[Any, int]:
    """llguidance's view of the vocabulary, and a bit for each id that may ever be chosen."""
    start = json.loads(receive_sized(control))
    sys.path[:] = start["path"]
    import llguidance

    data, tokens, end = receive_sized(control), [], 0
    for length in start["lengths"]:
        tokens.append(data[end : end + length])
        end += length
    vocabulary: Any = _Vocabulary(tokens, start["eos_ids"])
    vocabulary.library = llguidance.LLTokenizer(vocabulary, eos_token=start["eos_ids"])
    bits = bytearray(-(-len(tokens) // 8))
    for i in {i for i, token in enumerate(tokens) if token} | set(start["eos_ids"]):
        bits[i // 8] |= 1 << i % 8
    return vocabulary.library, int.from_bytes(bits, "little")


def main() -> None:
    """Standard input is a socket: first the vocabulary comes, then a socket for each grammar."""
    control = socket.socket(fileno=0)
    tokenizer, texts = _build_tokenizer(control)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the processes that end
    gc.freeze()  # what is there already stays in the memory that they share
    control.sendall(READY)
    while True:
        _, files, _, _ = socket.recv_fds(control, 1, 1)
        if not files:
            return
        connection = socket.socket(fileno=files[0])
        if _fork() == 0:
            control.close()
            try:
                _serve(connection, tokenizer, texts)
            finally:
                os._exit(0)  # without a traceback: a closed socket says it all
        connection.close()


def _fork() -> int:
    try:
        return os.fork()
    except OSError:  # no room for a process: the closed socket says so
        return -1


if __name__ == "__main__":
    main()
