"""What the command line says beside its answers: on standard error."""

import sys


def say(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)
