"""After a pass: note what has run, choose the next tokens, append them, let go who has ended."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tramontane.engine.block_manager import BlockManager
from tramontane.engine.choosing import Choice, Turn, choose_tokens, describe_damage
from tramontane.engine.drafts import DraftSource
from tramontane.engine.logprobs import compute_logprobs
from tramontane.engine.model_runner import PassInput, PassOutput
from tramontane.engine.scheduler import Scheduler, Share
from tramontane.engine.sequence import Sequence

_MAX_UNCOUNTED = 1024  # tokens whose experts are kept to be counted together


class _Part(NamedTuple):
    """What of a pass is one sequence's: tokens from `start`, and `num_rows` rows from `first_row`.

    The last `num_drafts` of its tokens are guesses.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_drafts: int
    first_row: int
    num_rows: int


class OutputProcessor:
    """Turns the scores of a pass into tokens."""

    def __init__(
        self,
        scheduler: Scheduler,
        blocks: BlockManager,
        *,
        num_experts: int,
        max_num_drafts: int,
    ) -> None:
        self._scheduler, self._blocks = scheduler, blocks
        self._num_experts, self._max_num_drafts = num_experts, max_num_drafts
        self._pass_sizes: Counter[int] = Counter()  # passes by their number of tokens
        self._num_prompt_tokens = self._num_generated = 0
        self._num_drafts = self._num_accepted_drafts = 0
        self._expert_tokens: Tensor | None = None  # (L, E) int64
        self._uncounted: list[Tensor] = []  # experts of passes, (S, L, T, K)
        self._num_uncounted = 0  # tokens of them

    def list_counts(self) -> dict[str, Any]:
        """What `EngineStats` says of the passes so far; of experts, a little less while it runs."""
        counts = self._expert_tokens
        return {
            "num_passes": self._pass_sizes.total(),
            "pass_sizes": dict(self._pass_sizes),
            "num_prompt_tokens": self._num_prompt_tokens,
            "num_generation_tokens": self._num_generated,
            "num_drafts": self._num_drafts,
            "num_accepted_drafts": self._num_accepted_drafts,
            "expert_tokens": [] if counts is None else counts.tolist(),
        }

    def process(self, shares: list[Share], given: PassInput, output: PassOutput) -> list[Sequence]:
        """All of it, step after step; returns the sequences that something has happened to."""
        self._keep_experts(output)
        touched: list[Sequence] = []
        for step in range(len(output.next_tokens)):
            parts = _list_parts(shares, given)
            if not parts:
                break
            new = self._process_step(parts, output, step)
            touched = touched or new  # no later step has others
        if self._num_uncounted >= _MAX_UNCOUNTED or not self._scheduler.num_unfinished:
            self._count_experts()
        return touched

    def _process_step(self, parts: list[_Part], output: PassOutput, step: int) -> list[Sequence]:
        self._pass_sizes[sum([part.num_tokens for part in parts])] += 1
        touched = [part.sequence for part in parts]
        routing = None
        if any(sequence.request.routing != "none" for sequence in touched):
            routing = _list_routing(output)
        turns: list[Turn] = []
        guesses: list[_Part] = []
        for part in parts:
            try:
                self._note(part, output, routing)
            except Exception as error:  # of this request alone, whatever it is
                touched += self._scheduler.fail(part.sequence, error)[1:]
                continue
            if part.sequence.is_finished:  # no answer was wanted
                siblings = part.sequence.take_siblings()
                for sibling in siblings:
                    sibling.answer.inherit_prompt(part.sequence.answer)
                    sibling.finish("length")
                touched += siblings
            if part.sequence.num_pending_tokens or part.sequence.is_finished:
                continue
            if part.num_drafts:
                guesses.append(part)
                continue
            row = part.first_row + part.num_rows - 1
            turns.append(Turn(part.sequence, row))
            if part.sequence.siblings:
                siblings = part.sequence.take_siblings()
                running = [s for s in siblings if self._scheduler.fork(part.sequence, s)]
                turns += [Turn(sequence, row) for sequence in running]
                touched += running
        for choice in choose_tokens(turns, output, step=step):
            self._append(choice)
        for part in guesses:
            self._try_drafts(part, output, routing)
        for sequence in touched:
            self._settle(sequence)
        if output.experts is not None and step + 1 < len(output.next_tokens):
            for part in parts:
                if part.sequence.is_finished:  # what ran after its end counts as never chosen
                    output.experts[step + 1 :, :, part.start] = -1
        return touched

    def _note(self, part: _Part, output: PassOutput, routing: "_Routing | None") -> None:
        """The tokens of a part have run; whether its drafts are right is not yet known."""
        sequence, num_tokens = part.sequence, part.num_tokens - part.num_drafts
        if sequence.wants_prompt_logprobs:
            rows = slice(part.first_row, part.first_row + part.num_rows)
            if not all(output.is_finite[0][rows]):
                raise describe_damage()
            self._record_prompt_logprobs(sequence, output.logits[rows])
        if sequence.request.wants_embedding:
            hidden = output.hidden[part.start : part.start + num_tokens].double()
            if not hidden.isfinite().all():
                raise describe_damage()
            sequence.answer.add_hidden(sequence.num_computed_tokens, hidden.cpu().numpy())
        self._advance(part, routing, start=0, num_tokens=num_tokens)
        if not sequence.params.max_tokens and not sequence.num_pending_tokens:
            sequence.finish("length")

    def _advance(
        self, part: _Part, routing: "_Routing | None", *, start: int, num_tokens: int
    ) -> None:
        """Note that tokens start .. start + num_tokens of a part are in the cache."""
        sequence = part.sequence
        if routing is not None and sequence.request.routing != "none":
            at = slice(part.start + start, part.start + start + num_tokens)
            sequence.answer.record_routing(
                sequence.num_computed_tokens, routing.experts[at], routing.weights[at]
            )
        sequence.num_computed_tokens += num_tokens
        self._blocks.commit(sequence)

    def _append(self, choice: Choice) -> None:
        """Give a sequence its token."""
        sequence = choice.sequence
        if choice.error is not None:
            self._scheduler.fail(sequence, choice.error)
            return
        try:
            sequence.append_token(choice.token_id, choice.logprob)
        except Exception as error:  # of this request alone, whatever it is
            self._scheduler.fail(sequence, error)
            return
        self._num_generated += 1

    def _try_drafts(self, part: _Part, output: PassOutput, routing: "_Routing | None") -> None:
        """Choose token after token, as long as each is the one that was guessed to come."""
        sequence, source, num_accepted = part.sequence, part.sequence.draft_source, 0
        assert source is not None, "drafts without a source"
        drafts = sequence.draft_ids[: part.num_drafts]
        while not sequence.is_finished:
            [choice] = choose_tokens([Turn(sequence, part.first_row + num_accepted)], output)
            self._append(choice)
            is_right = num_accepted < len(drafts) and choice.token_id == drafts[num_accepted]
            if sequence.is_finished or not is_right:
                break
            num_accepted += 1
            self._advance(part, routing, start=num_accepted, num_tokens=1)
        source.learn(len(drafts), num_accepted)
        self._num_drafts += len(drafts)
        self._num_accepted_drafts += num_accepted

    def _record_prompt_logprobs(self, sequence: Sequence, rows: Tensor) -> None:
        """The scores of these rows, one for each token of a chunk, are of the tokens after them."""
        known = sequence.answer.prompt_logprobs
        first = sequence.num_computed_tokens + 1  # what the first row tells about
        skipped = len(known) - first  # known from before a preemption
        last = min(first + len(rows), sequence.num_prompt_tokens)
        if skipped < last - first:
            token_ids = sequence.token_ids[first + skipped : last]
            num_top = sequence.params.prompt_logprobs
            assert num_top is not None
            known += compute_logprobs(rows[skipped : last - first], token_ids, num_top)

    def _settle(self, sequence: Sequence) -> None:
        """Let go who has ended; guess what comes next for those that go on."""
        if sequence.is_finished:
            self._scheduler.remove(sequence)
            if sequence.choice == 0:
                self._num_prompt_tokens += sequence.num_prompt_tokens
        elif self._max_num_drafts and sequence.num_pending_tokens == 1:
            if sequence.draft_source is None:
                sequence.draft_source = DraftSource(self._max_num_drafts)
            # The more sequences share a pass, the less a guess for one of them is worth.
            room = self._max_num_drafts // max(1, len(self._scheduler.running))
            limit = min(room, sequence.max_len - len(sequence.token_ids) - 1)
            sequence.draft_ids = sequence.draft_source.propose(sequence.token_ids, limit)

    def _keep_experts(self, output: PassOutput) -> None:
        """To be counted later: for a few tokens it takes too long."""
        if output.experts is not None:
            self._uncounted.append(output.experts)
            self._num_uncounted += output.experts.shape[0] * output.experts.shape[2]

    def _count_experts(self) -> None:
        if not self._uncounted:
            return
        columns = self._num_experts + 1  # the first is for -1, where a token has fewer experts
        found = [experts.transpose(0, 1).flatten(1) + 1 for experts in self._uncounted]
        shifted = torch.cat(found, dim=1).cpu()  # (L, all S * T * K)
        num_layers = len(shifted)
        shifted += torch.arange(num_layers)[:, None] * columns
        counts = torch.bincount(shifted.flatten(), minlength=num_layers * columns)
        counts = counts.view(num_layers, columns)[:, 1:]
        previous = self._expert_tokens
        self._expert_tokens = counts if previous is None else previous + counts
        self._uncounted, self._num_uncounted = [], 0


class _Routing(NamedTuple):
    """Of the tokens of a pass: experts (T, L, K) int16, and their weights fp32."""

    experts: np.ndarray
    weights: np.ndarray


def _list_routing(output: PassOutput) -> _Routing | None:
    if output.experts is None or output.weights is None:
        return None
    experts = output.experts[-1].transpose(0, 1).to(torch.int16)
    return _Routing(experts.cpu().numpy(), output.weights.transpose(0, 1).cpu().numpy())


def _list_parts(shares: list[Share], given: PassInput) -> list[_Part]:
    """Those of sequences that have not ended in an earlier step of the same call."""
    parts, start = [], 0
    for (sequence, num_tokens), first_row, num_rows in zip(
        shares, given.first_rows, given.num_rows, strict=True
    ):
        num_drafts = max(0, num_tokens - sequence.num_pending_tokens)
        if not sequence.is_finished:
            parts.append(_Part(sequence, start, num_tokens, num_drafts, first_row, num_rows))
        start += num_tokens
    return parts
