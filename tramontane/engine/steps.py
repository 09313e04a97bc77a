"""How many steps one call runs: several while every sequence only takes its best token.

They end before a sequence takes another block, and after a token that ends one, so that blocks,
counts and texts are those of one step at a time. Example: of three sequences that have run 18, 21
and 43 tokens the last fills its block of 16 with 5 more, so one call runs 5 steps.
"""

import torch

from tramontane.engine.scheduler import Share
from tramontane.engine.sequence import Sequence
from tramontane.kernels.native_decoder import ONE_STEP, Steps

MAX_SECONDS = 0.01  # no step begins later: so long those wait who come, leave or read along


def plan_steps(shares: list[Share], *, most: int, block_size: int) -> Steps:
    """The steps of a pass over `shares`, whose next tokens have their places: at most `most`."""
    for sequence, _ in shares:
        room = block_size - sequence.num_computed_tokens % block_size
        most = min(most, room, sequence.max_len - len(sequence.token_ids))
        if most <= 1 or not _takes_best(sequence):
            return ONE_STEP
    ends = {end for sequence, _ in shares for end in sequence.answer.end_ids}
    return Steps(most, MAX_SECONDS, torch.tensor(sorted(ends), dtype=torch.int64))


def _takes_best(sequence: Sequence) -> bool:
    """Whether nothing else of the next steps of a sequence is wanted: it is past its prompt."""
    request, params = sequence.request, sequence.params
    return (
        params.is_greedy
        and sequence.sampler.is_plain
        and params.logprobs is None
        and request.routing == "none"
        and not request.wants_embedding
        and sequence.num_pending_tokens == 1
        and len(sequence.token_ids) > sequence.num_prompt_tokens
    )
