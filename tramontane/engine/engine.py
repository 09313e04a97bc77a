"""The loop of generation: choose tokens to run, run them in one forward pass, append what comes.

What goes wrong with one sequence ends that one, with its error; what goes wrong in a pass ends the
sequences of that pass. The others go on, and no block of the cache is lost.
"""

from tramontane.config import ModelConfig
from tramontane.config.moe import CapacityOptions
from tramontane.engine.block_manager import BlockManager
from tramontane.engine.kv_cache import KVPool, count_block_bytes
from tramontane.engine.limits import EngineLimits, EngineStats
from tramontane.engine.model_runner import ModelRunner
from tramontane.engine.output_processor import OutputProcessor
from tramontane.engine.scheduler import RefusedError, Scheduler, Share
from tramontane.engine.sequence import Sequence
from tramontane.engine.steps import plan_steps
from tramontane.errors import ConfigError
from tramontane.kernels.native_decoder import ONE_STEP, Steps
from tramontane.models.transformer import Transformer


class Engine:
    """Runs the sequences that were added, within `limits`, first come first served.

    Only the first `vocab_size` ids are ever chosen: a model's head may be padded beyond them.
    Raises CapacityError if there is no memory for the cache, and ConfigError on a model whose
    answers would depend on the requests beside them.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        vocab_size: int | None = None,
        limits: EngineLimits | None = None,
    ) -> None:
        self.limits = limits or EngineLimits()
        _require_independence(model.config)
        config, weight = model.config, model.tok_embeddings.weight
        self._window = config.sliding_window
        self._blocks = BlockManager(
            _count_blocks(model, self.limits),
            window=config.sliding_window,
            use_prefix_cache=self.limits.use_prefix_cache,
        )
        self._pool = KVPool(
            config, self._blocks.num_blocks, dtype=weight.dtype, device=weight.device
        )
        self._runner = ModelRunner(model, self._pool, vocab_size=vocab_size or config.vocab_size)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=self.limits.max_num_seqs,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            max_waiting=self.limits.max_waiting,
        )
        self._outputs = OutputProcessor(
            self._scheduler,
            self._blocks,
            num_experts=config.moe.num_experts if config.moe else 0,
            max_num_drafts=self.limits.max_num_drafts,
        )

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait or run."""
        return self._scheduler.num_unfinished

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return self._scheduler.num_waiting

    @property
    def longest(self) -> int:
        """The most tokens of prompt and answer that the cache can hold for one sequence."""
        return self._blocks.longest

    @property
    def num_cache_bytes(self) -> int:
        """Bytes of the blocks that sequences hold."""
        num_held = self._blocks.num_blocks - self._blocks.num_free
        return num_held * (self._pool.num_bytes // self._pool.num_blocks)

    def list_kernel_seconds(self) -> dict[str, float]:
        """Seconds so far in each part of the model; empty unless it runs as one native call."""
        return self._runner.list_seconds()

    def get_stats(self) -> EngineStats:
        """What has been done so far."""
        usage = 1 - self._blocks.num_free / self._blocks.num_blocks
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=self._scheduler.num_waiting,
            kv_cache_usage=usage,
            prefix_cache_queries=self._scheduler.num_prefix_queries,
            prefix_cache_hits=self._scheduler.num_prefix_hits,
            num_preemptions=self._scheduler.num_preemptions,
            **self._outputs.list_counts(),
        )

    def describe_cache(self) -> dict[str, str | int | None]:
        """The cache of keys and values, in the words of vLLM's `cache_config_info`."""
        pool = self._pool
        return {
            "block_size": pool.block_size,
            "cache_dtype": str(pool.buffer.dtype).removeprefix("torch."),
            "enable_prefix_caching": self.limits.use_prefix_cache,
            "kv_cache_memory_bytes": pool.num_bytes,
            "num_gpu_blocks": pool.num_blocks,
            "sliding_window": self._window,
        }

    def check_integrity(self) -> None:
        """Raise AssertionError if a block of the cache is lost or counted wrongly."""
        self._blocks.check_integrity(self._scheduler.running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; `step` brings it and its siblings forward.

        Raises CapacityError if it can never run, OverloadError if too many wait already.
        """
        if self.num_unfinished == 0 and self._runner.refresh():
            self._blocks.forget_kept()  # keys and values of other weights
        self._scheduler.add(sequence)

    def require_room(self, sequence: Sequence) -> None:
        """Raise CapacityError if a sequence could never run; may be called from any thread."""
        self._scheduler.require_room(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forget a sequence and free its blocks; nothing happens if it has finished.

        Siblings that wait for it to run their prompt begin by themselves.
        """
        self._scheduler.remove(sequence)
        if sequence.is_finished:
            return
        sequence.finish("abort")
        if unborn := sequence.take_siblings():
            unborn[0].siblings = unborn[1:]
            self._scheduler.enqueue(unborn[0])

    def step(self) -> list[Sequence]:
        """One forward pass; each sequence whose tokens have all run gets a new one.

        Where nothing else is wanted of a batch for a while, a few passes follow one another.
        Returns the sequences that something has happened to.
        """
        try:
            shares = self._scheduler.schedule()
        except RefusedError as refused:
            return self._scheduler.fail(refused.sequence, refused.__cause__)
        if not shares:
            return []
        try:
            if copies := self._blocks.take_copies():
                self._pool.copy_blocks(copies)
            steps = self._plan_steps(shares)
            given = self._runner.prepare(shares, num_steps=steps.most)
            output = self._runner.run(given, steps)
            return self._outputs.process(shares, given, output)
        except Exception as error:  # whatever it is, those that were not in this pass go on
            return self._end_pass(shares, error)

    def _end_pass(self, shares: list[Share], error: Exception) -> list[Sequence]:
        """End the sequences of a pass that failed, and those that were forked from them in it.

        Returns them all, those among them that had ended before it failed.
        """
        forked = [s for s in self._scheduler.running if not s.num_pending_tokens]
        touched = dict.fromkeys([*(sequence for sequence, _ in shares), *forked])
        for sequence in list(touched):
            touched |= dict.fromkeys(self._scheduler.fail(sequence, error))
        return list(touched)

    def _plan_steps(self, shares: list[Share]) -> Steps:
        """One if somebody waits, drafts are to be proposed after each, or no call runs several."""
        is_stepwise = self.limits.max_num_drafts or not self._runner.runs_natively
        if is_stepwise or self._scheduler.num_waiting:
            return ONE_STEP
        return plan_steps(shares, self._blocks, most=self.limits.max_num_steps)


def _require_independence(config: ModelConfig) -> None:
    options = config.moe.options if config.moe else None
    if isinstance(options, CapacityOptions) and options.eval_capacity_factor > 0:
        raise ConfigError(
            f"eval_capacity_factor is {options.eval_capacity_factor:g}: which experts a token gets "
            "would depend on the requests that run beside it; set it to 0 in the model's "
            "configuration to generate with it"
        )


def _count_blocks(model: Transformer, limits: EngineLimits) -> int:
    """Blocks for all sequences at full length, or as many as the memory allowed holds."""
    config = model.config
    longest = BlockManager(1, window=config.sliding_window).count_blocks(config.max_seq_len)
    block_bytes = count_block_bytes(config, model.tok_embeddings.weight.dtype)
    affordable = max(1, limits.kv_cache_memory_bytes // block_bytes)
    return min(limits.max_num_seqs * longest, affordable)
