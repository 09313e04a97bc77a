"""`tramontane pull`: fetch a model from the hub."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def pull(
    model: str,
    /,
    *,
    revision: str | None = None,
    format: str | None = None,
    folder: Annotated[Path | None, Parameter(name="--dir")] = None,
) -> None:
    """Fetch a model from the Hugging Face hub, in one format, into its cache on this machine.

    Only weights and what goes with them are fetched, never pickles or code. Run the same command
    again after an interruption: finished files are kept. HF_TOKEN opens gated models, HF_HOME
    moves the cache, HF_ENDPOINT names another hub.
    Example: tramontane pull mistralai/Mixtral-8x7B-Instruct-v0.1

    Parameters
    ----------
    model
        Its id on the hub, org/name; org/name:Q4_0 is the GGUF file with Q4_0 in its name.
    revision
        A branch, tag or commit; by default the branch main.
    format
        hf, quantized (our own), mistral, gguf, or gguf:PART for the GGUF file with PART in its
        name; by default the first of these that the repository has.
    folder
        Put the files here instead of the cache.
    """
    from tramontane.cli.byte_bar import show_byte_bar
    from tramontane.cli.machine import format_bytes
    from tramontane.cli.notices import say
    from tramontane.errors import ConfigError
    from tramontane.hub.cache import split_model_id
    from tramontane.hub.formats import parse_format
    from tramontane.hub.pull import plan_pull, run_pull

    name, part = split_model_id(model) or (model, "")
    chosen, part_of_format = (None, "") if format is None else parse_format(format)
    if part and (part_of_format or chosen not in (None, "gguf")):
        raise ConfigError(f"{model} names a GGUF file, and --format {format} something else")
    plan = plan_pull(
        name,
        revision=revision,
        format="gguf" if part else chosen,
        part=part or part_of_format,
        folder=folder,
    )
    choice, missing = plan.choice, plan.count_missing_bytes()
    size = format_bytes(plan.total_bytes)
    say(f"{name}: {len(choice.weights)} {choice.format} weight files, {size} in all")
    say(f"to fetch: {format_bytes(missing)}" if missing else "already there")
    with show_byte_bar(name) as on_bytes:
        path = run_pull(plan, on_bytes=on_bytes, check_config=_check_config)
    print(f"{name} ({choice.format}, {size}, commit {plan.commit[:12]}) is in\n  {path}")
    print(f"check it: tramontane verify {_name(model, path)}")
    print(f"run it:   tramontane run {_name(model, path)}")


def _check_config(path: Path) -> None:
    """Raise ConfigError or CheckpointError if a model with this configuration could not be used."""
    from tramontane.checkpoint.files.json_file import read_json
    from tramontane.config import ModelConfig
    from tramontane.errors import ConfigError

    if path.name == "config.json":
        try:
            ModelConfig.from_hf(read_json(path))
            return
        except ConfigError:
            pass  # one of our quantised models, perhaps; what knows all of them imports torch
    from tramontane.checkpoint.summary import summarize

    summarize(str(path))


def _name(model: str, path: Path) -> str:
    """The shortest argument that leads to what was fetched."""
    import shlex

    from tramontane.errors import CheckpointError
    from tramontane.hub.cache import resolve_model

    try:
        is_enough = resolve_model(model) == path
    except CheckpointError:  # fetched into a folder
        is_enough = False
    return model if is_enough else shlex.quote(str(path))
