"""From scores to tokens: what a request edits in its own row, and one draw for all rows.

Edits, in this order: constraint, allowed ids, bias, repetition penalty, presence and frequency
penalty, ends of text that come too early. The draw is `kernels.sample_tokens`.
"""

import random
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tramontane.engine.sampling_params import SamplingParams
from tramontane.errors import RequestError
from tramontane.kernels.dispatch import get_kernels
from tramontane.kernels.native_decoder import Draws

NEVER = float("-inf")


class TokenMatcher(Protocol):
    """What a sampler needs of a constraint at work: `constraints.Matcher`."""

    is_exhausted: bool

    def allowed_mask(self) -> Tensor:
        """Which ids may come next, bool (V,)."""
        ...

    def accept(self, token_id: int) -> None:
        """Go on by a token."""
        ...


class _Occurrences:
    """Which tokens came so far, and how often."""

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        counts = Counter(token_ids)
        self._places = {token_id: place for place, token_id in enumerate(counts)}
        self._ids = _to_tensor(counts)  # with room behind those that came
        self._counts = _to_tensor(counts.values()).float()

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            room = max(64, place)
            self._ids = torch.cat([self._ids, self._ids.new_zeros(room)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(room)])
        self._ids[place] = token_id
        self._counts[place] += 1

    def move(self, device: torch.device) -> None:
        self._ids, self._counts = self._ids.to(device), self._counts.to(device)

    @property
    def ids(self) -> Tensor:
        """The N tokens, each once: int64 (N,)."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> Tensor:
        """How often each came: fp32 (N,)."""
        return self._counts[: len(self._places)]


class DrawSettings(NamedTuple):
    """What the draw of a row depends on beside its scores and its random number."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    is_greedy: bool


class Sampler:
    """The state of one answer: what came before, its random numbers, where its constraint stands.

    Numbers come from `seed + index`, one for each token drawn, so that they depend on no other
    answer and on no device; without a seed they are new each time. Raises RequestError if an id of
    `params` is not in the vocabulary of V.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_ids: Iterable[int],
        vocab_size: int,
        eos_ids: Iterable[int] = (),
        index: int = 0,
        matcher: TokenMatcher | None = None,
    ) -> None:
        _require_known_ids(params, vocab_size)
        self.settings = DrawSettings(
            params.temperature, params.top_k, params.top_p, params.min_p, params.is_greedy
        )
        self._params = params
        self._seed = None if params.seed is None else params.seed + index
        self._ahead: deque[float] = deque()  # random numbers that were looked at
        self._matcher = matcher
        self._num_tokens = 0  # of the answer so far
        ends = {i for i in eos_ids if i < vocab_size} | {*params.stop_token_ids}
        self._ends = _to_tensor(ends)
        self._banned: Tensor | None = None  # bool (V,)
        self._bias_ids = _to_tensor(params.logit_bias)
        self._bias: Tensor | None = None
        self._seen: _Occurrences | None = None  # in the prompt and the answer
        self._answer: _Occurrences | None = None
        if params.allowed_token_ids:
            self._banned = torch.ones(vocab_size, dtype=torch.bool)
            self._banned[_to_tensor(params.allowed_token_ids)] = False
        if params.logit_bias:
            self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        if params.repetition_penalty != 1:
            # The rows that fill up a model's head are no part of the vocabulary.
            self._seen = _Occurrences(i for i in prompt_ids if i < vocab_size)
        if params.presence_penalty or params.frequency_penalty:
            self._answer = _Occurrences()
        state = (matcher, self._banned, self._bias, self._seen, self._answer)
        self._always_edits = any(part is not None for part in state)

    @property
    def is_plain(self) -> bool:
        """Whether the next token's scores need no edit."""
        return not self._always_edits and self._num_tokens >= self._params.min_tokens

    @property
    def is_exhausted(self) -> bool:
        """Whether the constraint allows nothing more: the answer ends here."""
        return self._matcher is not None and self._matcher.is_exhausted

    def close(self) -> None:
        """The answer has ended: let go of its constraint, although others may still hold this."""
        self._matcher = None

    def edit(self, logits: Tensor) -> Tensor:
        """New scores from those of the model, both fp32 (V,).

        Raises RequestError if no token is left, or the constraint cannot be followed.
        """
        self._move(logits.device)
        if self._matcher is None:
            edited = logits.clone()
        else:
            edited = torch.where(self._matcher.allowed_mask().to(logits.device), logits, NEVER)
        if self._banned is not None:
            edited.masked_fill_(self._banned, NEVER)
        if self._bias is not None:
            edited.index_add_(0, self._bias_ids, self._bias)
        self._penalize(edited)
        if is_too_early := self._num_tokens < self._params.min_tokens:
            edited[self._ends] = NEVER
        can_be_empty = is_too_early or self._matcher is not None or self._banned is not None
        if can_be_empty and edited.max() == NEVER:
            raise RequestError(
                "no token is left to choose: the constraint, allowed_token_ids and min_tokens "
                "contradict each other here"
            )
        return edited

    def draw_number(self) -> float:
        """The next random number, from 0 up to but not 1."""
        return self._ahead.popleft() if self._ahead else self._random.random()

    @cached_property
    def _random(self) -> random.Random:
        """Made when it is needed: to begin without a seed takes a third of a millisecond."""
        return random.Random(self._seed)

    def foresee_numbers(self, count: int) -> list[float]:
        """What `draw_number` will give the next times; 0 where nothing is drawn."""
        if self.settings.is_greedy:
            return [0.0] * count
        while len(self._ahead) < count:
            self._ahead.append(self._random.random())
        return list(islice(self._ahead, count))

    def accept(self, token_id: int) -> None:
        """Note the token that was chosen. Raises RequestError if the constraint has failed."""
        self._num_tokens += 1
        for occurrences in (self._seen, self._answer):
            if occurrences is not None:
                occurrences.add(token_id)
        if self._matcher is not None:
            self._matcher.accept(token_id)

    def _penalize(self, logits: Tensor) -> None:
        """In place. Repetition: arXiv:1909.05858, section 4.1; presence and frequency: OpenAI's."""
        params = self._params
        if self._seen is not None:
            ids, penalty = self._seen.ids, params.repetition_penalty
            scores = logits[ids]
            logits[ids] = torch.where(scores < 0, scores * penalty, scores / penalty)
        if self._answer is not None:
            change = params.presence_penalty + params.frequency_penalty * self._answer.counts
            logits[self._answer.ids] -= change

    def _move(self, device: torch.device) -> None:
        """Keep the state where the scores are."""
        if self._ends.device == device:
            return
        for occurrences in (self._seen, self._answer):
            if occurrences is not None:
                occurrences.move(device)
        for name in ("_ends", "_banned", "_bias_ids", "_bias"):
            if (part := getattr(self, name)) is not None:
                setattr(self, name, part.to(device))


def sample_rows(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The next token of each row of scores fp32 (R, V), edited before where a sampler wants it.

    No row's token depends on the rows beside it.
    """
    settings = tuple([sampler.settings for sampler in samplers])
    if all(row.is_greedy for row in settings):
        return logits.argmax(dim=-1).tolist()
    numbers = [0.0 if s.settings.is_greedy else s.draw_number() for s in samplers]
    drawn = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
    stacked = _stack_settings(settings, logits.device)
    return get_kernels().sample_tokens(logits, *stacked, drawn).tolist()


def plan_draws(samplers: Sequence[Sampler], num_steps: int) -> Draws | None:
    """How the next tokens of rows on the CPU are drawn, for so many steps; None: all are greedy."""
    settings = tuple([sampler.settings for sampler in samplers])
    if all(row.is_greedy for row in settings):
        return None
    columns = [sampler.foresee_numbers(num_steps) for sampler in samplers]
    numbers = torch.tensor(columns, dtype=torch.float64).t().contiguous()
    return Draws(*_stack_settings(settings, torch.device("cpu")), numbers)


@lru_cache(maxsize=16)  # those of a batch stay the same until an answer ends or begins
def _stack_settings(
    settings: tuple[DrawSettings, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """temperature fp32 (R,), top_k int64 (R,), top_p fp32 (R,), min_p fp32 (R,)."""
    heat, top_k, top_p, min_p, _ = zip(*settings, strict=True)
    numbers = [torch.tensor(column, dtype=torch.float32, device=device)
               for column in (heat, top_p, min_p)]  # fmt: skip
    return numbers[0], torch.tensor(top_k, device=device), numbers[1], numbers[2]


def _require_known_ids(params: SamplingParams, vocab_size: int) -> None:
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        if (highest := max(getattr(params, name), default=0)) >= vocab_size:
            raise RequestError(
                f"{name} holds the id {highest}; ids of this model are 0 to {vocab_size - 1}"
            )


def _to_tensor(ids: Iterable[int]) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64)
