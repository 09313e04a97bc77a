"""Mistral's safety prefix: a policy of the operator, which no request can lower.

off: nobody gets it, and asking for it is an error. request: those who ask get it (`safe_prompt`, or
its first name `safe_mode`). always: everyone does, whatever the request says, whichever route.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from tramontane.server.errors import invalid
from tramontane.server.protocol.answers import Safety
from tramontane.server.protocol.sampling import SamplingFields
from tramontane.server.settings import SafetyPolicy

# docs.mistral.ai, "Guardrailing", December 2023.
SAFE_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely. Avoid "
    "harmful, unethical, prejudiced, or negative content. Ensure replies promote fairness and "
    "positivity."
)
HEADER = "x-tramontane-safe-prompt"


def needs_prefix(fields: SamplingFields, policy: SafetyPolicy) -> bool:
    """Whether the prefix is put before this request. Raises ApiError 400 under "off"."""
    asked = "safe_prompt" if fields.safe_prompt else "safe_mode" if fields.safe_mode else None
    if policy == "off" and asked:
        raise invalid(
            f"{asked} is set, but this server's policy is --safe-prompt off: the request would run "
            f"without the prefix",
            asked,
        )
    return policy == "always" or asked is not None


def prefix_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The prefix as the system's first words; before those that the conversation has itself."""
    first = messages[0]
    if first["role"] == "system":
        merged = {**first, "content": SAFE_PROMPT + "\n\n" + first["content"]}
        return [merged, *messages[1:]]
    return [{"role": "system", "content": SAFE_PROMPT}, *messages]


def describe_safety(
    policy: SafetyPolicy, *, is_prefixed: bool, prompts: Sequence[Sequence[int]]
) -> Safety:
    """What the answer says: a client can check what the model read."""
    digests = [sha256(np.asarray(ids, "<i4").tobytes()).hexdigest() for ids in prompts]
    prefix = SAFE_PROMPT if is_prefixed else None
    return {"policy": policy, "prefix": prefix, "prompt_sha256": digests}


def build_header(policy: SafetyPolicy, *, is_prefixed: bool) -> dict[str, str]:
    """The same in a header, also of errors that come later than this."""
    return {HEADER: f"{'mistral' if is_prefixed else 'none'}; policy={policy}"}
