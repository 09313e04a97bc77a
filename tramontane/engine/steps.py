"""How many steps one call runs: several while every sequence takes its tokens from plain scores.

They end after a token that ends one, so that counts and texts are those of one step at a time. The
blocks for them are taken before, of those that hold nothing. If there are too few, the steps end
with the first block that is full: of three sequences that have run 18, 21 and 43 tokens the last
fills its block of 16 with 5 more, so one call runs 5 steps.
"""

import torch

from tramontane.engine.block_manager import BlockManager
from tramontane.engine.sampler import plan_draws
from tramontane.engine.scheduler import Share
from tramontane.engine.sequence import Sequence
from tramontane.kernels.native_decoder import ONE_STEP, Steps

MAX_SECONDS = 0.01  # no step begins later: so long those wait who come, leave or read along


def plan_steps(shares: list[Share], blocks: BlockManager, *, most: int) -> Steps:
    """The steps of a pass over `shares`, whose next tokens have their places: at most `most`.

    All of them have their places then, and the numbers that their tokens are drawn by.
    """
    for sequence, _ in shares:
        most = min(most, sequence.max_len - len(sequence.token_ids))
        if most <= 1 or not _takes_plain_scores(sequence):
            return ONE_STEP
    sequences = [sequence for sequence, _ in shares]
    if not blocks.reserve_ahead(sequences, most):
        size = blocks.block_size
        most = min(most, *(size - sequence.num_computed_tokens % size for sequence in sequences))
        if most == 1:
            return ONE_STEP
    ends = {end for sequence in sequences for end in sequence.answer.end_ids}
    draws = plan_draws([sequence.sampler for sequence in sequences], most)
    return Steps(most, MAX_SECONDS, torch.tensor(sorted(ends), dtype=torch.int64), draws)


def _takes_plain_scores(sequence: Sequence) -> bool:
    """Whether the next tokens are chosen from scores without an edit, and nothing else is wanted.

    It is past its prompt then.
    """
    request, params = sequence.request, sequence.params
    return (
        sequence.sampler.is_plain
        and params.logprobs is None
        and request.routing == "none"
        and not request.wants_embedding
        and sequence.num_pending_tokens == 1
        and len(sequence.token_ids) > sequence.num_prompt_tokens
    )
