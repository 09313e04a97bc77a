"""The generation loop: choose tokens to run, run them in one forward pass, append what comes out.

Prompts run in chunks beside the decoding of other sequences, at most `max_num_batched_tokens` in
one pass. A request that ends or is aborted leaves nothing behind.
"""

from collections import deque
from collections.abc import Sequence as Items
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tramontane.engine.kv_cache import KVCache, batch_layer_caches
from tramontane.engine.native_model import build_native_model
from tramontane.engine.sampler import Sampler, sample_rows
from tramontane.engine.sequence import Sequence
from tramontane.errors import CheckpointError, ConfigError
from tramontane.models.transformer import ForwardOutput, Transformer

MAX_NUM_BATCHED_TOKENS = 512
MAX_NUM_SEQS = 16


class _Running(NamedTuple):
    """A sequence with what it holds while it runs."""

    sequence: Sequence
    cache: KVCache
    sampler: Sampler


class _Share(NamedTuple):
    """How many of its next tokens a sequence runs in this pass."""

    running: _Running
    num_tokens: int


class Engine:
    """Runs the sequences that were added, `max_num_seqs` at a time, first come first served.

    Only the first `vocab_size` ids are ever chosen: a model's head may be padded beyond them.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        vocab_size: int | None = None,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        max_num_seqs: int = MAX_NUM_SEQS,
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs is {max_num_seqs} and max_num_batched_tokens is "
                f"{max_num_batched_tokens}; both must be at least 1, and the first no larger"
            )
        self._model = model
        self._native = build_native_model(model)
        self._vocab_size = vocab_size or model.config.vocab_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[Sequence] = deque()
        self._running: list[_Running] = []

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self._waiting) + len(self._running)

    def list_kernel_seconds(self) -> dict[str, float]:
        """Seconds so far in each part of the model; empty unless it runs as one native call."""
        return {} if self._native is None else self._native.list_seconds()

    @property
    def num_cache_bytes(self) -> int:
        """Bytes that the caches of the running sequences occupy."""
        return sum(running.cache.num_bytes for running in self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; `step` brings it forward."""
        self._waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence and free its cache; nothing happens if it has finished."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._running = [r for r in self._running if r.sequence is not sequence]
        if not sequence.is_finished:
            sequence.finish("abort")

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass; each sequence whose tokens have all run gets a new one.

        Raises CheckpointError if the model's scores are not finite, and CapacityError if a cache
        cannot be allocated. A pass that fails ends its sequences: their caches are half written.
        """
        shares = self._schedule()
        with ExitStack() as undo:
            for share in shares:
                undo.callback(self.abort, share.running.sequence)
            wants_routing = any(share.running.sequence.collect_routing for share in shares)
            output = self._run_model(shares, with_routing=wants_routing)
            self._record(shares, output if wants_routing else None)
            self._append_tokens(shares, output.hidden)
            undo.pop_all()
        self._running = [r for r in self._running if not r.sequence.is_finished]

    def _schedule(self) -> list[_Share]:
        """Admit waiting sequences, then share out the pass: decoding first, long prompts last."""
        while self._waiting and len(self._running) < self._max_num_seqs:
            self._running.append(self._start(self._waiting[0]))
            self._waiting.popleft()
        room = self._max_num_batched_tokens
        shares = []
        for running in sorted(self._running, key=lambda r: r.sequence.num_pending_tokens):
            num_tokens = min(running.sequence.num_pending_tokens, room)
            if num_tokens:
                shares.append(_Share(running, num_tokens))
            room -= num_tokens
        return shares

    def _start(self, sequence: Sequence) -> _Running:
        if self._native is None or not self._native.is_current():
            self._native = build_native_model(self._model)
        weight, config = self._model.tok_embeddings.weight, self._model.config
        cache = KVCache(
            config, max_tokens=sequence.max_len, dtype=weight.dtype, device=weight.device
        )
        sampler = Sampler(
            sequence.params,
            prompt_ids=sequence.token_ids,
            vocab_size=self._vocab_size,
            eos_ids=sequence.eos_ids,
            matcher=sequence.matcher,
        )
        return _Running(sequence, cache, sampler)

    def _run_model(self, shares: Items[_Share], *, with_routing: bool) -> ForwardOutput:
        tokens: list[int] = []
        positions: list[int] = []
        for (sequence, _, _), num_tokens in shares:
            start = sequence.num_cached_tokens
            positions += range(start, start + num_tokens)
            tokens += sequence.token_ids[start : start + num_tokens]
        caches = [running.cache for running, _ in shares]
        seqlens = [num_tokens for _, num_tokens in shares]
        device = self._model.tok_embeddings.weight.device
        token_ids = torch.tensor(tokens, device=device)
        if self._native is not None:
            output = self._native.run(token_ids, seqlens, caches, with_routing=with_routing)
            if output is not None:
                return output
        states = batch_layer_caches(caches, seqlens)
        return self._model(token_ids, torch.tensor(positions, device=device), states)

    def _record(self, shares: Items[_Share], output: ForwardOutput | None) -> None:
        """Note what has run; `output` holds the routing, if it is wanted."""
        experts = None if output is None else _stack_experts(output)
        start = 0
        for (sequence, _, _), num_tokens in shares:
            mine = None
            if experts is not None and sequence.collect_routing:
                mine = experts[start : start + num_tokens]
            sequence.advance(num_tokens, selected_experts=mine)
            start += num_tokens

    def _append_tokens(self, shares: Items[_Share], hidden: Tensor) -> None:
        """Sample for the sequences that have run all their tokens; one transfer from the device."""
        ready, rows, end = [], [], 0
        for running, num_tokens in shares:
            end += num_tokens
            if running.sequence.num_pending_tokens == 0:
                ready.append(running)
                rows.append(end - 1)  # the last of its tokens predicts the next
        if not ready:
            return
        last = hidden if len(rows) == len(hidden) else hidden[rows]
        logits = self._model.compute_logits(last)[:, : self._vocab_size]  # (B, V)
        samplers = [running.sampler for running in ready]
        rows_left = [
            row if s.is_plain else s.edit(row) for s, row in zip(samplers, logits, strict=True)
        ]
        token_ids = sample_rows(torch.stack(rows_left), samplers)
        low, high = logits.aminmax()  # one pass; NaN wins over every number
        if not torch.isfinite(high - low):
            raise CheckpointError(
                "the model's scores are not finite (NaN or infinity); its weights are damaged, or "
                "overflow in this dtype: load it again, or with dtype float32"
            )
        for running, token_id in zip(ready, token_ids, strict=True):
            running.sampler.accept(token_id)
            running.sequence.append_token(token_id)
            if running.sampler.is_exhausted and not running.sequence.is_finished:
                running.sequence.finish("stop")


def _stack_experts(output: ForwardOutput) -> np.ndarray | None:
    """The experts of all layers, (T, L, K) int16; None for a dense model."""
    if not output.routing:
        return None
    experts = torch.stack([routing.experts for routing in output.routing], dim=1)
    return experts.to(torch.int16).cpu().numpy()
