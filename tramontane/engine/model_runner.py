"""One forward pass over the tokens that the scheduler chose, and the scores of those that need any.

Shapes: T tokens of the pass, B sequences, R rows of scores, V vocabulary, L layers, K experts per
token, D dim.
"""

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tramontane.engine.kv_cache import KVPool, PagedBatch, build_layer_states
from tramontane.engine.native_model import build_native_model, list_tensor_states
from tramontane.engine.scheduler import Share
from tramontane.kernels.native_decoder import ONE_STEP, Steps
from tramontane.kernels.reference import NO_EXPERT
from tramontane.models.transformer import Transformer

_POSITIONS = 256  # the longest of a batch is rounded up to, so that it rarely changes


class PassInput(NamedTuple):
    """What runs: tokens (T,), `rows` (R,) the tokens whose scores are wanted, counts (T,) or None.

    `first_rows[i]` and `num_rows[i]` are share i's part of the rows. All int64.
    """

    tokens: Tensor
    batch: PagedBatch
    rows: Tensor
    counts: Tensor | None
    first_rows: list[int]
    num_rows: list[int]


class PassOutput(NamedTuple):
    """What one call gives of its S steps; logits, hidden states and weights are of the last one.

    Of each row: logits (R, V) fp32, and of each step the id of the best score, or of the token that
    was drawn (`is_drawn`), and whether all are finite. Of each token: final hidden states (T, D),
    and of a sparse model experts (S, L, T, K) and weights (L, T, K).
    """

    logits: Tensor
    next_tokens: list[list[int]]
    is_finite: list[list[bool]]
    is_drawn: bool
    hidden: Tensor
    experts: Tensor | None
    weights: Tensor | None


class ModelRunner:
    """Runs `model` on the blocks of `pool`. Only the first `vocab_size` ids get scores."""

    def __init__(self, model: Transformer, pool: KVPool, *, vocab_size: int) -> None:
        self._model, self._pool, self._vocab_size = model, pool, vocab_size
        self._native = build_native_model(model, num_choices=vocab_size)
        self._state = list_tensor_states(model)
        self._device = model.tok_embeddings.weight.device
        self._steady: _SteadyBatch | None = None

    @property
    def runs_natively(self) -> bool:
        """Whether the model is one native call, which can run several steps."""
        return self._native is not None

    def list_seconds(self) -> dict[str, float]:
        """Seconds so far in each part of the model; empty unless it runs as one native call."""
        return {} if self._native is None else self._native.list_seconds()

    def refresh(self) -> bool:
        """Notice that the model has got other weights, in training for example; True if it has."""
        state = list_tensor_states(self._model)
        if state == self._state:
            return False
        self._native = build_native_model(self._model, num_choices=self._vocab_size)
        self._state = state
        return True

    def prepare(self, shares: list[Share], *, num_steps: int = 1) -> PassInput:
        """Lay out the tokens of these shares, and see which of them need scores.

        So many steps may follow one another, whose places are all reserved.
        """
        if self._steady is not None:
            given = self._steady.follow(shares, num_steps)
            if given is not None:
                return given
        given = self._lay_out(shares, num_steps)
        self._steady = _SteadyBatch.start(shares, given)
        return given

    def _lay_out(self, shares: list[Share], num_steps: int) -> PassInput:
        tokens: list[int] = []
        rows: list[int] = []
        first_rows, num_rows = [], []
        for sequence, num_tokens in shares:
            start = sequence.num_computed_tokens
            num_real = min(num_tokens, sequence.num_pending_tokens)
            tokens += sequence.token_ids[start : start + num_real]
            tokens += sequence.draft_ids[: num_tokens - num_real]
            count = sequence.count_rows(num_tokens)
            first_rows.append(len(rows))
            num_rows.append(count)
            rows += range(len(tokens) - count, len(tokens))
        num_queries = [num_tokens for _, num_tokens in shares]
        num_keys = [sequence.num_computed_tokens + n for sequence, n in shares]
        tables = _pad([sequence.block_table for sequence, _ in shares])
        ids, scored, queries, keys, blocks = self._tensors(
            tokens, rows, num_queries, num_keys, [block for table in tables for block in table]
        )
        longest = -(-(max(num_keys) + num_steps - 1) // _POSITIONS) * _POSITIONS
        batch = PagedBatch(blocks.view(len(tables), -1), queries, keys, longest)
        return PassInput(ids, batch, scored, self._count_experts(shares), first_rows, num_rows)

    def run(self, given: PassInput, steps: Steps = ONE_STEP) -> PassOutput:
        """One pass, and where the model is one native call those that `steps` lets follow it.

        Raises CapacityError if there is no memory for it.
        """
        if self._native is not None:
            output = self._run_natively(given, steps)
            if output is not None:
                return output
        return self._run_torch(given)

    @torch.inference_mode()
    def _run_torch(self, given: PassInput) -> PassOutput:
        """Layer by layer: what the extension does not take."""
        batch = given.batch
        states = build_layer_states(self._pool, batch)
        spans = zip(batch.num_queries.tolist(), batch.num_keys.tolist(), strict=True)
        positions = torch.cat([torch.arange(end - n, end, device=self._device) for n, end in spans])
        output = self._model(given.tokens, positions, states, experts_per_token=given.counts)
        logits = self._model.compute_logits(output.hidden[given.rows])[:, : self._vocab_size]
        low, high = logits.aminmax(dim=1)  # NaN wins over every number
        experts = weights = None
        if output.routing:
            experts = _stack_slots([r.experts for r in output.routing], filler=NO_EXPERT)[None]
            weights = _stack_slots([r.weights for r in output.routing], filler=0)
        return PassOutput(
            logits,
            [logits.argmax(dim=1).tolist()],
            [torch.isfinite(high - low).tolist()],
            False,
            output.hidden,
            experts,
            weights,
        )

    def _run_natively(self, given: PassInput, steps: Steps) -> PassOutput | None:
        assert self._native is not None
        found = self._native.run(
            given.tokens, self._pool, given.batch, rows=given.rows, counts=given.counts, steps=steps
        )
        if found is None:
            return None
        logits = found.logits
        if logits.shape[1] != self._vocab_size:
            logits = logits[:, : self._vocab_size]
        return PassOutput(
            logits,
            found.next_tokens.tolist(),
            found.is_finite.tolist(),
            steps.draws is not None,
            found.hidden,
            found.experts,
            found.weights,
        )

    def _count_experts(self, shares: Items[Share]) -> Tensor | None:
        """Experts of each token, None if all run through the model's own number of them."""
        asked = [sequence.params.experts_per_token for sequence, _ in shares]
        if not any(asked):
            return None
        moe = self._model.config.moe
        assert moe is not None, asked
        counts: list[int] = []
        for count, (_, num_tokens) in zip(asked, shares, strict=True):
            counts += [count or moe.num_experts_per_tok] * num_tokens
        return self._tensors(counts)[0]

    def _tensors(self, *parts: list[int]) -> Items[Tensor]:
        """Each list as int64; parts of one tensor, because building one takes a few us."""
        numbers = [number for part in parts for number in part]
        whole = torch.from_numpy(np.array(numbers, dtype=np.int64)).to(self._device)
        return whole.split([len(part) for part in parts])


class _SteadyBatch:
    """A pass in which each sequence decodes one token, and what changes of it in the next.

    Building its tensors anew takes as long as a part of a small model.
    """

    def __init__(self, shares: list[Share], given: PassInput) -> None:
        self._given, self._sequences = given, [sequence for sequence, _ in shares]
        self._tables = [list(sequence.block_table) for sequence in self._sequences]
        self._tokens, self._keys = given.tokens.numpy(), given.batch.num_keys.numpy()

    @classmethod
    def start(cls, shares: list[Share], given: PassInput) -> "_SteadyBatch | None":
        """None if this is no such pass."""
        is_steady = given.tokens.is_cpu and all(
            num_tokens == 1 and sequence.num_pending_tokens == 1 for sequence, num_tokens in shares
        )
        return cls(shares, given) if is_steady and all(given.num_rows) else None

    def follow(self, shares: list[Share], num_steps: int) -> PassInput | None:
        """The next pass, in the tensors of the last one; None if the batch is another."""
        sequences = [sequence for sequence, _ in shares]
        if sequences != self._sequences or sum([n for _, n in shares]) != len(shares):
            return None
        if [sequence.block_table for sequence in sequences] != self._tables:
            return None
        num_keys = [sequence.num_computed_tokens + 1 for sequence in sequences]
        if max(num_keys) + num_steps - 1 > self._given.batch.longest:
            return None
        self._tokens[:] = [sequence.token_ids[-1] for sequence in sequences]
        self._keys[:] = num_keys
        return self._given


def _stack_slots(layers: list[Tensor], *, filler: int) -> Tensor:
    """Of each layer (T, k) -> (L, T, K): a dense layer has one slot, where others have K."""
    most = max(layer.shape[1] for layer in layers)
    return torch.stack([F.pad(x, (0, most - x.shape[1]), value=filler) for x in layers])


def _pad(tables: list[list[int]]) -> list[list[int]]:
    """Rows of one length; what follows the blocks of a shorter one is not read."""
    longest = max(map(len, tables))
    return [table + [0] * (longest - len(table)) for table in tables]
