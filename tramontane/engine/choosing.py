"""The next token of each of several sequences, from its row of scores; an error stays its own."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import NamedTuple

from tramontane.engine.completion import TokenLogprob
from tramontane.engine.logprobs import compute_logprobs
from tramontane.engine.model_runner import PassOutput
from tramontane.engine.sampler import sample_rows
from tramontane.engine.sequence import Sequence
from tramontane.errors import CheckpointError


class Turn(NamedTuple):
    """A sequence that gets a token, and the row of scores to choose it from."""

    sequence: Sequence
    row: int


class Choice(NamedTuple):
    """The token chosen for a sequence, or why none could be."""

    sequence: Sequence
    token_id: int = -1
    logprob: TokenLogprob | None = None
    error: Exception | None = None


def choose_tokens(turns: Items[Turn], output: PassOutput) -> Iterator[Choice]:
    """A choice for each turn; of two turns none depends on the other."""
    others: list[Turn] = []
    for sequence, row in turns:
        if not output.is_finite[row]:
            yield Choice(sequence, error=_describe_damage())
        elif sequence.sampler.is_plain and sequence.params.is_greedy:
            yield from _finish([Turn(sequence, row)], [output.best[row]], output)
        else:
            others.append(Turn(sequence, row))
    if others:
        yield from _sample(others, output)


def _sample(turns: list[Turn], output: PassOutput) -> Iterator[Choice]:
    """Edit the scores where a request asks for it, then draw for all at once."""
    logits = output.logits[[row for _, row in turns]]  # a copy (R, V)
    kept = []
    for i, turn in enumerate(turns):
        try:
            if not turn.sequence.sampler.is_plain:
                logits[i] = turn.sequence.sampler.edit(logits[i])
            kept.append(i)
        except Exception as error:  # of this request alone, whatever it is
            yield Choice(turn.sequence, error=error)
    if kept:
        turns = [turns[i] for i in kept]
        samplers = [sequence.sampler for sequence, _ in turns]
        yield from _finish(turns, sample_rows(logits[kept], samplers), output)


def _finish(turns: Items[Turn], token_ids: Items[int], output: PassOutput) -> Iterator[Choice]:
    """Tell the samplers what was chosen, and find its log-probability where that is wanted."""
    for (sequence, row), token_id in zip(turns, token_ids, strict=True):
        try:
            sequence.sampler.accept(token_id)
            logprob = None
            if (num_top := sequence.params.logprobs) is not None:
                logits = output.logits[row : row + 1]
                [logprob] = compute_logprobs(logits, [token_id], num_top)
        except Exception as error:  # of this request alone, whatever it is
            yield Choice(sequence, error=error)
        else:
            yield Choice(sequence, token_id, logprob)


def _describe_damage() -> CheckpointError:
    return CheckpointError(
        "the model's scores are not finite (NaN or infinity); its weights are damaged, or overflow "
        "in this dtype: load it again, or with dtype float32"
    )
