"""`tramontane run`: one answer, or an interactive session."""

import io
import os.path
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from tramontane.cli.answer import print_answer, use_color
from tramontane.cli.expert_view import ExpertPainter
from tramontane.cli.notices import say
from tramontane.cli.repl import Repl
from tramontane.cli.sampling_flags import SamplingFlags
from tramontane.cli.stats import format_overrides, format_params, print_stats
from tramontane.engine.sampling_params import SamplingParams
from tramontane.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from tramontane.config import ModelConfig
    from tramontane.engine.llm import LLM

_NO_FLAGS = SamplingFlags()


def run(
    model: str | None = None,
    prompt: str | None = None,
    /,
    *,
    sampling: Annotated[SamplingFlags, Parameter(name="*")] = _NO_FLAGS,
    quant: Literal["int8", "int4"] | None = None,
    chat: Annotated[bool, Parameter(negative=())] = False,
    stats: Annotated[bool, Parameter(negative=())] = False,
    experts: Annotated[int | bool, Parameter(negative=())] = False,
) -> None:
    """Generate text from a prompt, from standard input, or in an interactive session.

    Answers go to standard output, everything else to standard error.

    Parameters
    ----------
    model
        A folder or file in any layout (Hugging Face, Mistral, GGUF), or the id of a model that has
        been pulled; without it, the bundled model. A single argument that has a space in it and is
        no path is the prompt.
    prompt
        The beginning of a text; without it, an interactive session in a terminal, or else all of
        standard input (a last line end is dropped).
    sampling
        How to choose tokens and when to stop.
    quant
        Round the weights of experts and attention to 8 or 4 bits while they are read.
    chat
        Send the prompt, or each line of the session, as a user's message in the chat format that
        the model brings; a session remembers the conversation.
    stats
        Print settings, speed, memory and experts, and which defaults the generation_config.json
        of the model has changed.
    experts
        Colour tokens by their first expert at a layer: --experts (the middle one), --experts=LAYER.
    """
    given = sampling.list_given()
    SamplingParams(**given)  # a value out of range is reported before anything is loaded
    model, prompt = _split_arguments(model, prompt)
    is_interactive = prompt is None and sys.stdin.isatty() and sys.stdout.isatty()
    if not is_interactive:
        prompt = _check_prompt(_read_standard_input() if prompt is None else prompt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show all of Unicode

    from tramontane.engine.llm import LLM
    from tramontane.hub.cache import resolve_model

    llm = LLM(None if model is None else resolve_model(model), quant=quant, use_chat=chat)
    params = replace(llm.default_params, **given)
    painter = _build_painter(llm.config, experts)
    if stats:
        _announce(llm, params)
    if painter:
        say(painter.build_legend())
    if prompt is None:
        Repl(llm, params, use_chat=chat, painter=painter, show_stats=stats).run()
    else:
        _answer_once(llm, prompt, params, use_chat=chat, painter=painter, show_stats=stats)


def _split_arguments(first: str | None, second: str | None) -> tuple[str | None, str | None]:
    """Model and prompt: a single argument may be either."""
    if first is None or second is not None or (first and os.path.exists(first)):
        return first, second
    if not first or len(first.split()) > 1:
        return None, first
    if "/" in first:
        return first, None
    raise CheckpointError(
        f"there is no model {first!r}; if it is meant as a prompt, pass it on standard "
        f"input: echo {first} | tramontane run"
    )


def _read_standard_input() -> str:
    if sys.stdin.isatty():
        say("reading the prompt until Ctrl-D")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _check_prompt(prompt: str) -> str:
    if not prompt:
        raise RequestError("the prompt is empty; give a text as argument or on standard input")
    return prompt


def _build_painter(config: "ModelConfig", experts: int | bool) -> ExpertPainter | None:
    if experts is False:
        return None
    if config.moe is None:
        raise RequestError("--experts needs a mixture of experts; this model is dense")
    return ExpertPainter(
        None if experts is True else experts,
        n_layers=config.n_layers,
        num_experts=config.moe.num_experts,
        use_color=use_color(sys.stdout),
    )


def _announce(llm: "LLM", params: SamplingParams) -> None:
    """Say what is about to run."""
    count = llm.config.count_parameters()
    say(f"model        {llm.origin}, {count.total:,} parameters, {count.active:,} active")
    if overrides := format_overrides(llm.generation_config):
        say(overrides)
    say(f"settings     {format_params(params)}")


def _answer_once(
    llm: "LLM",
    prompt: str,
    params: SamplingParams,
    *,
    use_chat: bool,
    painter: ExpertPainter | None,
    show_stats: bool,
) -> None:
    is_routed = show_stats or painter is not None
    if use_chat:
        messages = [{"role": "user", "content": prompt}]
        stream = llm.stream_chat(messages, params, collect_routing=is_routed)
    else:
        stream = llm.stream(prompt, params, collect_routing=is_routed)
    print_answer(stream, sys.stdout, painter=painter)
    if show_stats:
        print_stats(stream.completion, llm.config)
