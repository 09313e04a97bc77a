"""The sampling settings as flags: None where a flag is not given, so that defaults can differ."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from tramontane.engine.sampling_params import SamplingParams


def _flag(name: str, help: str) -> Parameter:
    """Lets --help show the default that applies when the flag is not given."""
    default = getattr(SamplingParams(), name)
    shown = "none" if default in (None, ()) else default
    return Parameter(help=help, show_default=lambda _: shown, negative=())


@dataclass(frozen=True)
class SamplingFlags:
    """The flags that were given."""

    max_tokens: Annotated[int | None, _flag("max_tokens", "Length of the answer at most.")] = None
    temperature: Annotated[
        float | None, _flag("temperature", "Higher is more surprising; 0 takes the likeliest.")
    ] = None
    top_k: Annotated[
        int | None, _flag("top_k", "Choose among the k likeliest tokens; 0 is off.")
    ] = None
    top_p: Annotated[
        float | None, _flag("top_p", "Choose among the likeliest that make up p; 1 is off.")
    ] = None
    min_p: Annotated[
        float | None, _flag("min_p", "Drop tokens less than p times as likely as the best.")
    ] = None
    repetition_penalty: Annotated[
        float | None, _flag("repetition_penalty", "Above 1 avoids what was said; 1 is off.")
    ] = None
    seed: Annotated[int | None, _flag("seed", "The same seed gives the same answer.")] = None
    stop: Annotated[
        tuple[str, ...] | None, _flag("stop", "End before this text; may be repeated.")
    ] = None

    def list_given(self) -> dict[str, Any]:
        """The flags that were given, by their names in SamplingParams."""
        return {name: value for name, value in asdict(self).items() if value is not None}
