"""The interactive session: each line is a prompt, a message of a conversation, or a /command."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from tramontane.cli.answer import print_answer
from tramontane.cli.expert_view import ExpertPainter
from tramontane.cli.line_history import keep_history
from tramontane.cli.notices import say
from tramontane.cli.stats import format_params, print_stats
from tramontane.engine.completion import Completion
from tramontane.engine.sampling_params import SamplingParams
from tramontane.errors import RequestError, TramontaneError

if TYPE_CHECKING:
    from tramontane.engine.llm import LLM, TextStream

HELP = """\
Type the beginning of a text; the model continues it. Each line stands alone."""
CHAT_HELP = """\
Type a message; the model answers, and remembers the conversation.
/new                  forget it and begin anew"""
COMMANDS = """\
/set                  show the settings
/set temperature 0.7  change one; "none" empties seed and stop
/stats                speed, memory and experts of the last answer
/help                 this text
/quit or Ctrl-D       leave; Ctrl-C stops an answer"""


class Repl:
    """Reads lines until Ctrl-D; answers go to standard output, all else to standard error."""

    def __init__(
        self,
        llm: "LLM",
        params: SamplingParams,
        *,
        use_chat: bool = False,
        painter: ExpertPainter | None = None,
        show_stats: bool = False,
    ) -> None:
        self._llm, self._params, self._use_chat = llm, params, use_chat
        self._painter, self._show_stats = painter, show_stats
        self._messages: list[dict[str, str]] = []  # of the conversation, with its answers
        self._last: Completion | None = None
        self._is_done = False
        self._help = f"{CHAT_HELP if use_chat else HELP}\n{COMMANDS}"
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: say(self._help),
            "set": self._set,
            "stats": lambda _: self._print_stats(),
            "quit": lambda _: self._leave(),
        }
        if use_chat:
            self._commands["new"] = lambda _: self._messages.clear()

    def run(self) -> None:
        """The session, from greeting to good-bye."""
        what = "a message" if self._use_chat else "the beginning of a text"
        say(f"Type {what}. /help lists the commands, Ctrl-D leaves.")
        with keep_history():
            while not self._is_done:
                try:
                    self.handle_line(input("> "))
                except EOFError:
                    say("")
                    return
                except KeyboardInterrupt:
                    say("\nCtrl-D leaves")

    def handle_line(self, line: str) -> None:
        """Answer a prompt or obey a command; what goes wrong is printed."""
        try:
            if line.startswith("/"):
                self._obey(line)
            elif line.strip():
                self._answer(line)
        except TramontaneError as error:
            say(f"error: {error}")

    def _obey(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if name not in self._commands:
            known = " ".join(f"/{command}" for command in self._commands)
            raise RequestError(f"there is no command /{name}; there are {known}")
        self._commands[name](argument.strip())

    def _answer(self, prompt: str) -> None:
        stream = self._start(prompt)
        try:
            print_answer(stream, sys.stdout, painter=self._painter)
        except KeyboardInterrupt:
            say("(stopped)")
        self._last = stream.completion
        answer = self._last.text
        if self._use_chat and answer:  # a message that got no answer is as if it was not sent
            self._messages += _make_turn(prompt, answer)
        if self._show_stats:
            self._print_stats()

    def _start(self, prompt: str) -> "TextStream":
        if not self._use_chat:
            return self._llm.stream(prompt, self._params, collect_routing=True)
        messages = [*self._messages, *_make_turn(prompt)]
        return self._llm.stream_chat(messages, self._params, collect_routing=True)

    def _set(self, argument: str) -> None:
        if argument:
            name, _, value = argument.partition(" ")
            if not value.strip():
                raise RequestError(f"/set {name} needs a value, for example: /set temperature 0.7")
            self._params = self._params.with_setting(name, value.strip())
        say(format_params(self._params))

    def _print_stats(self) -> None:
        if self._last is None:
            raise RequestError("there is no answer yet")
        print_stats(self._last, self._llm.config)

    def _leave(self) -> None:
        self._is_done = True


def _make_turn(prompt: str, *answer: str) -> list[dict[str, str]]:
    """A message of the user, and what was answered."""
    contents = zip(("user", "assistant"), (prompt, *answer), strict=False)
    return [{"role": role, "content": content} for role, content in contents]
