"""`tramontane run` in a pseudo-terminal: what a person types and sees."""

import os
import pty
import select
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

    def wait_for(self, text):
        """Read until `text`; returns everything up to it and forgets it."""
        end = time.monotonic() + PATIENCE
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {text!r}, saw {self.seen[-2000:]!r}"
            self.seen += os.read(self.fd, 4096)
        before, _, self.seen = self.seen.partition(text)
        return before

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
    """Make `fd` the controlling terminal, so that Ctrl-C becomes a signal."""
    import fcntl
    import termios

    fcntl.ioctl(fd, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose answers can be endless."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    return str(save_tiny_model(path, max_seq_len=1_000_000, sliding_window=32))


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
    while len(terminal.seen) < 100:  # the answer is streaming
        terminal.seen += os.read(terminal.fd, 4096)
    terminal.type(CTRL_C)
    terminal.wait_for(b"(stopped)")
    terminal.wait_for(b"> ")
    terminal.type(CTRL_C)
    terminal.wait_for(b"Ctrl-D leaves")
    terminal.type(b"/stats\n")
    terminal.wait_for(b"tokens/s, stopped")
    terminal.type(b"/quit\n")
    assert terminal.wait_for_exit()[0] == 0


def test_ctrl_c_ends_a_single_answer_with_130(open_terminal, folder):
    terminal = open_terminal(folder, "a prompt", "--max-tokens", "900000", "--temperature", "3")
    while len(terminal.seen) < 100:
        terminal.seen += os.read(terminal.fd, 4096)
    terminal.type(CTRL_C)
    code, seen = terminal.wait_for_exit()
    assert code == 130
    assert b"Traceback" not in seen


def test_experts_are_coloured_in_a_terminal_unless_no_color(open_terminal, folder):
    arguments = (folder, "a prompt", "--max-tokens", "20", "--experts")
    assert b"\x1b[3" in open_terminal(*arguments).wait_for_exit()[1]
    code, seen = open_terminal(*arguments, NO_COLOR="1").wait_for_exit()
    assert code == 0
    assert b"\x1b" not in seen
    assert b"[e" in seen


def test_control_characters_of_the_model_do_not_reach_the_terminal(open_terminal, folder):
    """A model over single bytes says everything sooner or later, the escape character included."""
    arguments = (folder, "a prompt", "--max-tokens", "3000", "--temperature", "100", "--top-p", "1")
    code, seen = open_terminal(*arguments).wait_for_exit()
    assert code == 0
    assert not set(seen.decode("utf-8")) & set(map(chr, [*range(9), *range(14, 32), 127]))


def test_unusable_history_is_said_once(open_terminal, folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    terminal = open_terminal(folder, XDG_STATE_HOME=str(tmp_path / "file"))
    terminal.wait_for(b"> ")
    terminal.type(CTRL_D)
    code, seen = terminal.wait_for_exit()
    assert code == 0
    assert seen.count(b"cannot be used") == 1
