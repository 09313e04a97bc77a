"""What a caller asks of the engine: a prompt, and how to answer it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tramontane.engine.sampling_params import SamplingParams

RoutingWanted = Literal["none", "answer", "all"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt. `prompt_ids` may be any sequence of ids.

    `starts_text`: the answer is a text of its own, as in a conversation, and not the continuation
    of the prompt's: a vocabulary's space before the first word is dropped. `routing` asks for the
    experts of the answer's tokens, or of the prompt's too (which then runs whole, whatever is kept
    of it). Tenants have their turns one after another; only requests of one `tenant` and
    `cache_salt` share what is kept of their prompts. `wants_embedding` asks for the mean of the
    prompt's final hidden states.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    starts_text: bool = False
    routing: RoutingWanted = "none"
    tenant: str = ""
    cache_salt: str = ""
    wants_embedding: bool = False
