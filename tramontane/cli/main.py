"""The `tramontane` command: finds the verb, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 an error of ours (its message says what to do), 2 wrong usage, 130 Ctrl-C,
141 the reader of a pipe has left (`tramontane run ... | head`).
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from tramontane import __version__
from tramontane.errors import TramontaneError

# What `tramontane --help` lists stands here: reading it from all verbs would import torch.
_VERBS = {
    "run": "Generate text from a prompt, from standard input, or in an interactive session.",
    "serve": "Serve a model over HTTP: OpenAI's and Mistral's interfaces, and a page.",
    "train": "Train a model on text.",
    "perplexity": "Score a model on held-out text, in bits per byte.",
    "show": "Print what a model is, without reading its weights.",
    "estimate": "Estimate the memory that a model takes, before it is there.",
    "convert": "Write a model in another layout: Hugging Face, Mistral, or GGUF.",
    "quantize": "Write a model with weights of 4 or 8 bits, to be run.",
    "upcycle": "Write a dense model as a mixture of experts that answers the same.",
    "ancestry": "Find out whether one model was made from another, by their weights.",
    "pull": "Fetch a model from the Hugging Face hub.",
    "list": "List the models on this machine.",
    "rm": "Remove a model from the hub's cache.",
    "verify": "Check every byte of a model against checksums or a torrent.",
    "doctor": "Print the machine, the versions, and what they mean for speed.",
}
_PLACES = {"list": "list_models:list_models"}  # where a verb's name is not its function's
_TOKENIZER_VERBS = {"train": "Train a byte-level BPE tokenizer on text."}


def build_app(called: Sequence[str] = ()) -> App:
    """The tree of verbs; nothing of a verb is imported before it is called.

    The verb that `called`, a command line, begins with has the help of its docstring.
    """
    app = App(
        name="tramontane",
        help="Train, run and look inside Mixtral models.",
        version=__version__,
        suppress_keyboard_interrupt=False,  # run_command answers it
    )
    for verb, summary in _VERBS.items():
        place = _PLACES.get(verb, f"{verb}:{verb}")
        shown = None if verb in called[:1] else summary
        app.command(f"tramontane.cli.{place}", name=verb, help=shown)
    tokenizer = App(name="tokenizer", help="Make tokenizers.")
    for verb, summary in _TOKENIZER_VERBS.items():
        shown = None if verb in called[1:2] else summary
        tokenizer.command(f"tramontane.cli.tokenizer:{verb}", name=verb, help=shown)
    app.command(tokenizer)
    return app


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line without the program's name, and return its exit code."""
    try:
        build_app(arguments)(list(arguments), exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2  # cyclopts has printed what is wrong
    except TramontaneError as error:
        print(f"tramontane: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        print(f"tramontane: error: {_describe(error)}", file=sys.stderr)
        return 1
    return 0


def _describe(error: OSError) -> str:
    """The file, and what the system says of it."""
    if error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}; check the name, and who may read and write there"


def _discard_output() -> None:
    """Send what Python writes at exit, the rest of its buffers, nowhere: the pipe is closed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point of the `tramontane` script."""
    sys.exit(run_command(sys.argv[1:]))
