"""Processes that compile and follow grammars, seen from the server: see grammar_worker.py.

`GrammarHost` starts one process that knows the vocabulary and does nothing but fork. Each
`GrammarProcess` is such a fork; it ends when nobody holds it any longer, or when the kernel ends
it. Requests are written ahead: an answer's next mask is computed while the model runs.
"""

import json
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tramontane.engine import grammar_worker as worker
from tramontane.errors import ConfigError, EngineError, RequestError

MEMORY_BYTES = 64 * 2**20  # that a grammar may take while it is compiled and followed
STEP_SECONDS = 0.5  # that one token may take
_PATIENCE = 10.0  # seconds more that the processor may be busy with others
_MAX_PENDING = 32  # replies that are not read; with more of them both sides could wait to write
_MAX_LINES, _MAX_LINE = 6, 80  # of an error in a message, and their characters


class Reply:
    """What a process will say to a request, or has said."""

    __slots__ = ("data", "status")

    def __init__(self) -> None:
        self.status: int | None = None
        self.data = b""


class GrammarProcess:
    """One compiled grammar. `name` describes it in errors; `num_bytes` is what it has taken.

    Raises RequestError if it is not accepted: the library's own words, or the limit exceeded.
    """

    def __init__(
        self, connection: socket.socket, task: dict[str, Any], *, name: str, compile_seconds: float
    ) -> None:
        self.num_bytes = 0
        self._connection, self._name = connection, name
        self._pending: deque[Reply] = deque()
        self._forgotten: deque[int] = deque()
        self._num_sessions = 0
        self._lock = threading.Lock()
        self._failure: str | None = None
        connection.settimeout(compile_seconds + _PATIENCE)
        limits = {"compile_seconds": compile_seconds, "step_seconds": STEP_SECONDS,
                  "memory": MEMORY_BYTES}  # fmt: skip
        first = Reply()
        self._pending.append(first)
        start = time.monotonic()
        try:
            worker.send_sized(connection, json.dumps(task | limits).encode())
            self._read_one()
        except (OSError, EOFError):
            is_late = time.monotonic() - start >= compile_seconds
            raise RequestError(
                f"the {name} {_describe_end(compile_seconds if is_late else None)}: simplify it"
            ) from None
        if first.status == worker.FAILED:
            raise RequestError(f"the {name} cannot be used: {_shorten(first.data)}")
        connection.settimeout(STEP_SECONDS + _PATIENCE)

    def __del__(self) -> None:
        self._connection.close()

    @property
    def is_alive(self) -> bool:
        """Whether it still answers."""
        return self._failure is None

    def open_session(self, *, parent: int | None = None) -> int:
        """A new answer, as far as `parent` or at the beginning."""
        with self._lock:
            self._num_sessions += 1
            new = self._num_sessions
            if parent is None:
                self._send(worker.OPEN, new, 0)
            else:
                self._send(worker.COPY, parent, new)
            return new

    def forget(self, session: int) -> None:
        """An answer has ended. Takes no lock, as garbage is collected at any moment."""
        self._forgotten.append(session)

    def request(self, session: int, *requests: tuple[bytes, int]) -> list[Reply]:
        """Ask for (operation, argument) each; `wait` gives the replies."""
        with self._lock:
            replies = []
            for operation, argument in requests:
                self._send(operation, session, argument)
                replies.append(Reply())
                self._pending.append(replies[-1])
            return replies

    def wait(self, reply: Reply) -> Reply:
        """`reply` when it is there. Raises RequestError if it is an error, or never comes."""
        if reply.status is None:
            with self._lock:
                self._guard(lambda: self._read_until(reply))
        if reply.status == worker.FAILED:
            raise RequestError(f"the {self._name} was not followed: {_shorten(reply.data)}")
        if reply.status is None:
            raise RequestError(self._failure)
        return reply

    def _send(self, operation: bytes, session: int, argument: int) -> None:
        data = b""
        while self._forgotten:
            data += worker.REQUEST.pack(worker.CLOSE, self._forgotten.popleft(), 0)
        data += worker.REQUEST.pack(operation, session, argument)
        self._guard(lambda: self._write(data))

    def _write(self, data: bytes) -> None:
        while len(self._pending) > _MAX_PENDING:
            self._read_one()
        self._connection.sendall(data)

    def _read_until(self, reply: Reply) -> None:
        while reply.status is None:
            self._read_one()

    def _read_one(self) -> None:
        header = worker.receive(self._connection, worker.REPLY.size)
        status, kib, size = worker.REPLY.unpack(header)
        data = worker.receive(self._connection, size)
        self.num_bytes = kib * 1024
        reply = self._pending.popleft()
        reply.data = data
        reply.status = status  # last, for those who look without the lock

    def _guard(self, exchange: Callable[[], None]) -> None:
        """Note the end of the process; whoever waits for a reply learns of it."""
        if self._failure is not None:
            return
        try:
            exchange()
        except (OSError, EOFError):
            self._connection.close()
            self._failure = f"the {self._name} {_describe_end(STEP_SECONDS)} for one token"


class GrammarHost:
    """The process from which those of the grammars are forked.

    `tokens` are the bytes of each id, none for what is not text. Raises ConfigError without
    llguidance, or if the process does not start.
    """

    def __init__(self, tokens: Sequence[bytes], eos_ids: Sequence[int]) -> None:
        if find_spec("llguidance") is None:
            raise ConfigError(
                "JSON schemas, regular expressions and grammars need llguidance: "
                "pip install tramontane[serve]"
            )
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: the modules beside the file are no part of the path
                [sys.executable, "-P", str(Path(worker.__file__))],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is the server's to answer
            )  # fmt: skip
        self.close = weakref.finalize(self, _end_host, self._control, self._process)
        self._lock = threading.Lock()
        start = {"path": [*map(str, sys.path)], "lengths": [len(token) for token in tokens],
                 "eos_ids": list(eos_ids)}  # fmt: skip
        self._control.settimeout(_PATIENCE)
        try:
            worker.send_sized(self._control, json.dumps(start).encode())
            worker.send_sized(self._control, b"".join(tokens))
            worker.receive(self._control, len(worker.READY))
        except (OSError, EOFError) as error:
            self.close()
            raise ConfigError(
                f"the process that follows grammars did not start ({error}); try: "
                f"{sys.executable} -c 'import llguidance'"
            ) from None

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def start(self, task: dict[str, Any], *, name: str, compile_seconds: float) -> GrammarProcess:
        """A process with the grammar of `task`.

        Raises RequestError if it is not accepted, EngineError if this process has ended.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._lock:
                socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
        except OSError as error:
            ours.close()
            raise EngineError(f"the process that follows grammars has ended ({error})") from None
        return GrammarProcess(ours, task, name=name, compile_seconds=compile_seconds)


def _end_host(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """End the process; those forked from it end when nobody holds them."""
    control.close()
    process.terminate()
    process.wait()


def _describe_end(seconds: float | None) -> str:
    if seconds is None:
        return f"needs more than {MEMORY_BYTES // 2**20} MiB, or is nested too deeply"
    return f"needs more than {seconds:g} s or {MEMORY_BYTES // 2**20} MiB"


def _shorten(error: bytes) -> str:
    """The library's error on one line, which need not repeat the whole source."""
    text, *_ = error.decode("utf-8", errors="replace").split("<backtrace>")
    text = text.replace("panic:", "the library failed:").replace("<non-verbose/>", "")
    lines = [" ".join(line.split()) for line in text.split("\n") if line.strip(" ^")]
    return " ".join([_cut(line) for line in lines[:_MAX_LINES]])


def _cut(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}..."
