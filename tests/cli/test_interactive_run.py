"""`tramontane run` in a pseudo-terminal: what a person types and sees."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.model_folder import save_tiny_model

PROGRAM = [sys.executable, "-c", "from tramontane.cli.main import main; main()"]
PATIENCE = 60  # seconds; a busy machine may need several
CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, arguments, **environment):
        self.fd, child = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "PYTHONUTF8": "1", **environment}
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments], stdin=child, stdout=child, stderr=child, env=env,
            start_new_session=True, preexec_fn=lambda: _own_terminal(child),
        )  # fmt: skip
        os.close(child)
        self.seen = b""

    def type(self, keys):
        os.write(self.fd, keys)

    def insist(self, keys, text):
        """Type again each second until `text` comes: readline loses a signal when it starts."""
        for _ in range(PATIENCE):
            self.type(keys)
            while text not in self.seen and select.select([self.fd], [], [], 1)[0]:
                self._read(f"waited for {text!r}")
            if text in self.seen:
                break
        self.wait_for(text)

    def wait_for(self, text):
        """Read until `text`; returns everything up to it and forgets it."""
        start = time.monotonic()
        while text not in self.seen:
            self._read(f"waited for {text!r}")
            assert time.monotonic() - start < 5 * PATIENCE, f"{text!r} does not come"
        before, _, self.seen = self.seen.partition(text)
        return before

    def wait_for_output(self, count):
        """Read until `count` bytes have come."""
        while len(self.seen) < count:
            self._read(f"waited for {count} bytes")

    def _read(self, purpose):
        assert select.select([self.fd], [], [], PATIENCE)[0], f"{purpose}, saw {self.seen!r}"
        self.seen += os.read(self.fd, 4096)

    def wait_for_exit(self):
        """Read to the end; returns the exit code and what was seen."""
        try:
            while chunk := os.read(self.fd, 4096):
                self.seen += chunk
        except OSError:  # how Linux says that the other side has closed
            pass
        return self.process.wait(PATIENCE), self.seen

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


def _own_terminal(fd):
    """Make `fd` the controlling terminal, so that Ctrl-C becomes a signal, as in a new shell.

    A shell's background jobs, which tests may be part of, ignore it.
    """
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose answers are endless: no id that it knows ends them."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    endless = '{"eos_token_id": 1000}'
    changes = {"max_seq_len": 1_000_000, "sliding_window": 32}
    return str(save_tiny_model(path, generation_config=endless, **changes))


@pytest.fixture
def open_terminal(tmp_path):
    terminals = []

    def start(*arguments, **environment):
        environment.setdefault("XDG_STATE_HOME", str(tmp_path / "state"))
        terminals.append(Terminal(["run", *arguments], **environment))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_a_session_from_greeting_to_ctrl_d(open_terminal, folder, tmp_path):
    terminal = open_terminal(folder, "--max-tokens", "5", "--temperature", "0")
    terminal.wait_for(b"/help lists the commands")
    terminal.wait_for(b"> ")
    terminal.type(b"/stats\n")
    terminal.wait_for(b"error: there is no answer yet")
    terminal.type(b"Hello\n")
    terminal.wait_for(b"Hello\r\n")
    terminal.wait_for(b"> ")
    terminal.type(b"/stats\n")
    assert b"5 tokens" in terminal.wait_for(b"layer  1")
    terminal.type(b"/set temperature 0.7\n")
    terminal.wait_for(b"temperature 0.7, top_k 0, top_p 0.95")
    terminal.type(b"/set\n")
    terminal.wait_for(b"max_tokens 5, temperature 0.7")
    for line, message in [
        (b"/set warmth 3\n", b"error: there is no setting 'warmth'; there are max_tokens, "),
        (b"/set temperature -1\n", b"error: temperature is -1.0; it must be "),
        (b"/set temperature\n", b"error: /set temperature needs a value"),
        (b"/sing\n", b"error: there is no command /sing; there are /help /set /stats /quit"),
        (b"/help\n", b"show the settings"),
    ]:
        terminal.type(line)
        terminal.wait_for(message)
    terminal.wait_for(b"> ")
    terminal.type(CTRL_D)
    assert terminal.wait_for_exit()[0] == 0
    history = (tmp_path / "state" / "tramontane" / "history").read_text()
    assert "Hello" in history


def test_ctrl_c_stops_the_answer_and_not_the_program(open_terminal, folder):
    terminal = open_terminal(folder, "--max-tokens", "900000", "--temperature", "3")
    terminal.wait_for(b"> ")
    terminal.type(b"Hello\n")
    terminal.wait_for(b"Hello\r\n")
    terminal.wait_for_output(100)  # the answer is streaming
    terminal.type(CTRL_C)
    terminal.wait_for(b"(stopped)")
    terminal.wait_for(b"> ")
    terminal.insist(CTRL_C, b"Ctrl-D leaves")
    terminal.type(b"/stats\n")
    terminal.wait_for(b"tokens/s, stopped")
    terminal.type(b"/quit\n")
    assert terminal.wait_for_exit()[0] == 0


def test_ctrl_c_ends_a_single_answer_with_130(open_terminal, folder):
    terminal = open_terminal(folder, "a prompt", "--max-tokens", "900000", "--temperature", "3")
    terminal.wait_for_output(100)
    terminal.type(CTRL_C)
    code, seen = terminal.wait_for_exit()
    assert code == 130
    assert b"Traceback" not in seen


def test_experts_are_coloured_in_a_terminal(open_terminal, folder):
    code, seen = open_terminal(
        folder, "a prompt", "--max-tokens", "20", "--experts"
    ).wait_for_exit()
    assert code == 0
    assert b"\x1b[3" in seen


def test_control_characters_of_the_model_do_not_reach_the_terminal(open_terminal, folder):
    """A model over single bytes says everything sooner or later, the escape character included."""
    wild = ("--max-tokens", "3000", "--temperature", "100", "--top-p", "1", "--experts")
    code, seen = open_terminal(folder, "a prompt", *wild, NO_COLOR="1").wait_for_exit()
    assert code == 0
    assert b"[e" in seen
    controls = {chr(code) for code in [*range(32), 127] if chr(code) not in "\t\r\n"}
    assert not controls & set(seen.decode("utf-8"))


def test_a_conversation(open_terminal, folder, tmp_path):
    """Each prompt holds what was said before, until /new."""
    model = shutil.copytree(folder, tmp_path / "chat")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}|{% endfor %}"
    )
    terminal = open_terminal(
        str(model), "--chat", "--max-tokens", "5", "--temperature", "0", "--stats"
    )
    terminal.wait_for(b"Type a message. /help lists the commands")
    counts = []
    for line in (b"Hello\n", b"Hello\n", b"/new\n", b"Hello\n"):
        terminal.wait_for(b"> ")
        terminal.type(line)
        if not line.startswith(b"/"):
            terminal.wait_for(b"prompt       ")
            counts.append(int(terminal.wait_for(b" tokens")))
    terminal.wait_for(b"> ")
    assert counts[0] == counts[2] == len("Hello|")
    assert counts[1] > 2 * counts[0]
    terminal.type(CTRL_D)
    assert terminal.wait_for_exit()[0] == 0
