"""Prints an answer as it comes."""

import os
from typing import TYPE_CHECKING, TextIO

from tramontane.cli.expert_view import ExpertPainter

if TYPE_CHECKING:
    from tramontane.engine.llm import TextStream

# Control characters, but not tab and newline: a terminal would obey what the model says.
_CONTROLS = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"}


def use_color(out: TextIO) -> bool:
    """Colours go to terminals, unless NO_COLOR is set (https://no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_answer(stream: "TextStream", out: TextIO, *, painter: ExpertPainter | None) -> None:
    """Write each piece at once, and a line end after the last, also if Ctrl-C interrupts.

    On a terminal, control characters are replaced.
    """
    last = ""
    try:
        for piece in stream.iterate(with_experts=painter is not None):
            if out.isatty():
                piece = piece._replace(text=piece.text.translate(_CONTROLS))
            out.write(painter.paint(piece) if painter else piece.text)
            out.flush()
            last = piece.text
    finally:
        stream.close()
        if not last.endswith("\n"):
            out.write("\n")
            out.flush()
