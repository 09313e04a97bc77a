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


def choose_tokens(turns: Items[Turn], output: PassOutput, *, step: int = 0) -> list[Choice]:
    """A choice for each turn, in any order; no turn depends on another."""
    next_tokens, is_finite = output.next_tokens[step], output.is_finite[step]
    choices, others = [], []
    for turn in turns:
        sequence, row = turn
        if not is_finite[row]:
            choices.append(Choice(sequence, error=describe_damage()))
        elif output.is_drawn:
            if not sequence.params.is_greedy:
                sequence.sampler.draw_number()  # the one that it was drawn by
            choices.append(_conclude(turn, next_tokens[row], output))
        elif sequence.params.is_greedy and sequence.sampler.is_plain:
            choices.append(_conclude(turn, next_tokens[row], output))
        else:
            others.append(turn)
    if others:
        choices += _sample(others, output)
    return choices


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
    if not kept:
        return
    samplers = [turns[i].sequence.sampler for i in kept]
    scores = logits if len(kept) == len(turns) else logits[kept]
    for i, token_id in zip(kept, sample_rows(scores, samplers), strict=True):
        yield _conclude(turns[i], token_id, output)


def _conclude(turn: Turn, token_id: int, output: PassOutput) -> Choice:
    """Tell the sampler what was chosen, and find its log-probability where that is wanted."""
    sequence, row = turn
    try:
        sequence.sampler.accept(token_id)
        if (num_top := sequence.params.logprobs) is None:
            return Choice(sequence, token_id)
        [logprob] = compute_logprobs(output.logits[row : row + 1], [token_id], num_top)
        return Choice(sequence, token_id, logprob)
    except Exception as error:  # of this request alone, whatever it is
        return Choice(sequence, error=error)


def describe_damage() -> CheckpointError:
    """Why nothing can be made of a row of scores."""
    return CheckpointError(
        "the model's scores are not finite (NaN or infinity); its weights are damaged, or overflow "
        "in this dtype: load it again, or with dtype float32"
    )
