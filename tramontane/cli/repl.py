"""The interactive session: each line is a prompt that the model continues, or a /command."""

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
    from tramontane.engine.llm import LLM

HELP = """\
Type the beginning of a text; the model continues it. Each line stands alone.
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
        painter: ExpertPainter | None = None,
        show_stats: bool = False,
    ) -> None:
        self._llm, self._params = llm, params
        self._painter, self._show_stats = painter, show_stats
        self._last: Completion | None = None
        self._is_done = False
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: say(HELP),
            "set": self._set,
            "stats": lambda _: self._print_stats(),
            "quit": lambda _: self._leave(),
        }

    def run(self) -> None:
        """The session, from greeting to good-bye."""
        say("Type the beginning of a text. /help lists the commands, Ctrl-D leaves.")
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
        stream = self._llm.stream(prompt, self._params, collect_routing=True)
        try:
            print_answer(stream, sys.stdout, painter=self._painter)
        except KeyboardInterrupt:
            say("(stopped)")
        self._last = stream.completion
        if self._show_stats:
            self._print_stats()

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
