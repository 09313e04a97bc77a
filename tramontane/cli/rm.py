"""`tramontane rm`: remove a model from the hub's cache."""

from typing import Annotated

from cyclopts import Parameter


def rm(
    model: str,
    /,
    *,
    yes: Annotated[bool, Parameter(name=("--yes", "-y"), negative=())] = False,
) -> None:
    """Remove a model, every revision of it, from the hub's cache on this machine.

    Parameters
    ----------
    model
        Its id, org/name, as `tramontane list` shows it.
    yes
        Do not ask.
    """
    import sys

    from tramontane.cli.machine import format_bytes
    from tramontane.cli.notices import say
    from tramontane.errors import ConfigError
    from tramontane.hub.cache import measure_model, remove_model

    size = format_bytes(measure_model(model))
    if not yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"removing {model} ({size}) needs a terminal to ask, or --yes")
        say(f"remove {model}, {size}? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("kept")
            return
    freed = remove_model(model)
    print(f"removed {model}: {format_bytes(freed)} ({freed:,} bytes) freed")
