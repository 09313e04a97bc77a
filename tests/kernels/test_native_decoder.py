"""The decoder in one native call gives the bits of the model's own pass, whatever the batch."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.instruction_sets import INSTRUCTION_SETS, use_instruction_set
from tests.tiny import make_config, make_model, make_tokens
from tramontane.kernels import native
from tramontane.kernels.native_decoder import (
    ONE_STEP,
    CachePool,
    DecoderResults,
    DecoderSizes,
    Draws,
    LayerWeights,
    NativeDecoder,
    Steps,
    Weight,
)
from tramontane.models.transformer import ForwardOutput, Transformer
from tramontane.nn.attention import PackedSequences
from tramontane.nn.rope import compute_rope
from tramontane.quant.apply import quantize_model
from tramontane.quant.formats import QuantFormat, QuantRecipe

BLOCK_SIZE = 16
NUM_CHOICES = 101  # of 128: a head may be padded
# Tokens that each of three sequences runs in one pass after another; 0 is not in it.
PASSES = [(5, 1, 17), (1, 1, 1), (0, 30, 1), (1, 3, 0), (20, 1, 1), (40, 0, 2), (1, 1, 1)]
EXPERTS = (2, 5, 1)  # per token of each sequence, where they differ
NOWHERE = 2**40  # a block that would crash whoever reads it


@pytest.fixture(autouse=True, params=INSTRUCTION_SETS)
def _instruction_set(
    request: pytest.FixtureRequest, choose_kernels: Callable[[str], None]
) -> Iterator[None]:
    choose_kernels("native")
    with use_instruction_set(request.param), torch.inference_mode():
        yield


def find_weight(module: torch.nn.Module) -> Weight:
    return module.packed if hasattr(module, "packed") else module.weight


def build_decoder(model: Transformer, *, num_choices: int = NUM_CHOICES) -> NativeDecoder:
    config, layers = model.config, []
    for layer in model.layers:
        attention, block = layer.attention, layer.feed_forward
        stacks = [getattr(block.experts, name) for name in ("w1", "w2", "w3")]
        layers.append(LayerWeights(
            layer.attention_norm.weight,
            layer.ffn_norm.weight,
            tuple(find_weight(getattr(attention, name)) for name in ("wq", "wk", "wv", "wo")),
            block.gate.weight,
            tuple(stack.packed if hasattr(stack, "packed") else stack for stack in stacks),
        ))  # fmt: skip
    sizes = DecoderSizes(
        config.dim, config.n_heads, config.n_kv_heads, config.head_dim,
        config.moe.num_experts_per_tok, config.sliding_window or 0,
    )  # fmt: skip
    return NativeDecoder(
        sizes, layers, tok_embeddings=model.tok_embeddings.weight, norm=model.norm.weight,
        output=find_weight(model.output), num_choices=num_choices, eps=config.norm_eps,
    )  # fmt: skip


class Paged:
    """Sequences of a model whose keys and values lie in shuffled blocks of one pool."""

    def __init__(self, model: Transformer, num_sequences: int, *, max_tokens: int = 96) -> None:
        self.model = model  # the decoder knows its weights by address alone
        config, self.window = model.config, model.config.sliding_window
        num_blocks = num_sequences * (max_tokens // BLOCK_SIZE)
        shape = (config.n_layers, 2, num_blocks, config.n_kv_heads, BLOCK_SIZE, config.head_dim)
        self.pool = torch.full(shape, float("nan"), dtype=model.norm.weight.dtype)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
        self.tables = order.view(num_sequences, -1)
        self.lengths = [0] * num_sequences
        self.decoder = build_decoder(model)
        self.rope = compute_rope(
            torch.arange(max_tokens), head_dim=config.head_dim, theta=config.rope_theta
        )

    def run(
        self,
        tokens: Sequence[Tensor],
        *,
        rows: Tensor | None = None,
        counts: Tensor | None = None,
        steps: Steps = ONE_STEP,
    ) -> DecoderResults:
        """The next tokens of each sequence; those that have none are not in the batch."""
        active = [i for i, new in enumerate(tokens) if len(new)]
        tables = self.tables.clone()
        for i in active:
            self.forget(tables[i], self.lengths[i])
            self.lengths[i] += len(tokens[i])
        return self.decoder.run(
            torch.cat(list(tokens)), CachePool.locate(self.pool),
            torch.tensor([len(tokens[i]) for i in active]),
            torch.tensor([self.lengths[i] for i in active]),
            tables[active], *self.rope, rows=rows, counts=counts, steps=steps,
        )  # fmt: skip

    def forget(self, table: Tensor, num_tokens: int) -> None:
        """Blocks that no new token sees go to somebody else."""
        if self.window is not None:
            num_free = max(0, num_tokens + 1 - self.window) // BLOCK_SIZE
            self.pool[:, :, table[:num_free]] = float("nan")
            table[:num_free] = NOWHERE


def run_alone(model: Transformer, tokens: Tensor, count: int | None = None) -> ForwardOutput:
    """The model's own pass over a whole sequence, module by module."""
    counts = None if count is None else torch.full((len(tokens),), count)
    states = [PackedSequences([len(tokens)])] * len(model.layers)
    return model(tokens, torch.arange(len(tokens)), states, experts_per_token=counts)


def assert_same_bits(model: Transformer, experts: tuple[int, ...] | None = None) -> None:
    """All passes over three sequences at once, against each sequence alone and whole."""
    totals = [sum(lengths) for lengths in zip(*PASSES, strict=True)]
    sequences = [make_tokens(total, seed=i) for i, total in enumerate(totals)]
    whole = [run_alone(model, sequence, experts and experts[i])
             for i, sequence in enumerate(sequences)]  # fmt: skip
    paged = Paged(model, len(sequences))
    for lengths in PASSES:
        spans = [slice(n, n + length) for n, length in zip(paged.lengths, lengths, strict=True)]
        parts = [sequence[span] for sequence, span in zip(sequences, spans, strict=True)]
        counts = None
        if experts is not None:
            counts = torch.tensor(experts).repeat_interleave(torch.tensor(lengths))
        results = paged.run(parts, counts=counts)
        expected = torch.cat([one.hidden[span] for one, span in zip(whole, spans, strict=True)])
        assert torch.equal(results.hidden, expected)
        assert torch.equal(results.logits, model.compute_logits(expected))
        start = 0
        for one, span in zip(whole, spans, strict=True):
            rows = slice(start, start + span.stop - span.start)
            if rows.stop > rows.start:
                assert_same_routing(results, one, rows, span)
            start = rows.stop


def assert_same_routing(
    results: DecoderResults, expected: ForwardOutput, rows: slice, span: slice
) -> None:
    for layer, routing in enumerate(expected.routing):
        num_slots = routing.experts.shape[1]
        assert torch.equal(results.weights[layer, rows, :num_slots], routing.weights[span])
        assert torch.equal(results.experts[0, layer, rows, :num_slots], routing.experts[span])
        assert torch.equal(results.router_logits[layer, rows], routing.logits[span])
        assert not results.weights[layer, rows, num_slots:].any()
        assert (results.experts[0, layer, rows, num_slots:] == -1).all()


CONFIGS = [{}, {"sliding_window": 20}, {"sliding_window": 1}, {"n_kv_heads": 1},
           {"tie_embeddings": True}]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_plain(dtype: torch.dtype, changes: dict[str, int]) -> None:
    assert_same_bits(make_model(make_config(**changes)).to(dtype))


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(bits: int, head: bool) -> None:
    model = make_model(make_config(sliding_window=20)).bfloat16()
    quantize_model(model, QuantRecipe.from_format(QuantFormat(bits), head=head))
    assert_same_bits(model)
    assert_same_bits(model, EXPERTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sequence_with_its_own_number_of_experts(dtype: torch.dtype) -> None:
    assert_same_bits(make_model().to(dtype), EXPERTS)
    assert_same_bits(make_model().to(dtype), (8, 8, 8))


def test_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    model = make_model()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        paged = Paged(model, 2)
        results.append(paged.run([make_tokens(60), make_tokens(33, seed=1)]))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [128, 131, 1000])
@pytest.mark.parametrize("rows", [None, [], [6], [19, 0, 7, 7]], ids=str)
def test_head_of_the_rows_that_are_wanted(
    rows: list[int] | None, vocab_size: int, dtype: torch.dtype
) -> None:
    model = make_model(make_config(vocab_size=vocab_size)).to(dtype)
    wanted = None if rows is None else torch.tensor(rows, dtype=torch.int64)
    results = Paged(model, 2).run([make_tokens(13), make_tokens(7, seed=1)], rows=wanted)
    chosen = results.hidden if wanted is None else results.hidden[wanted]
    expected = model.compute_logits(chosen)
    assert torch.equal(results.logits, expected)
    assert torch.equal(results.next_tokens[0], expected[:, :NUM_CHOICES].argmax(-1))
    assert results.is_finite.all()
    assert (results.is_finite.dtype, results.is_finite.shape) == (torch.bool, (1, len(chosen)))


def test_of_equal_scores_the_lowest_id_is_best() -> None:
    model = make_model(make_config(vocab_size=700))
    order = torch.randperm(NUM_CHOICES, generator=torch.Generator().manual_seed(0))
    model.output.weight.copy_(model.output.weight[order[:10]].repeat(70, 1))
    results = Paged(model, 1).run([make_tokens(30)])
    assert torch.equal(results.next_tokens[0], results.logits[:, :10].argmax(-1))
    assert len(results.next_tokens.unique()) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 50, NUM_CHOICES - 1, NUM_CHOICES])
def test_scores_that_are_not_finite(column: int, value: float) -> None:
    """Only of those that a token is chosen from, and only where they are."""
    model = make_model()
    model.output.weight[column] = 0
    model.output.weight[column, 0] = value
    results = Paged(model, 1).run([make_tokens(9)])
    expected = model.compute_logits(results.hidden)
    assert torch.equal(results.logits.nan_to_num(), expected.nan_to_num())
    choices = expected[:, :NUM_CHOICES]
    assert torch.equal(results.is_finite[0], choices.isfinite().all(-1))
    assert results.is_finite.all() == (column == NUM_CHOICES)
    best = choices.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    assert torch.equal(results.next_tokens[0], best.argmax(-1))


def test_a_row_of_nan_has_some_best_and_disturbs_no_other() -> None:
    model = make_model()
    expected = Paged(model, 2).run([make_tokens(5), make_tokens(4, seed=1)])
    model.tok_embeddings.weight[make_tokens(4, seed=1)[0]] = float("nan")
    bad = make_tokens(4, seed=1)
    assert not torch.isin(bad[0], make_tokens(5))
    results = Paged(model, 2).run([make_tokens(5), bad])
    assert results.is_finite[0].tolist() == [True] * 5 + [False] * 4
    assert torch.equal(results.logits[:5], expected.logits[:5])
    assert torch.equal(results.next_tokens[:, :5], expected.next_tokens[:, :5])
    assert ((results.next_tokens >= 0) & (results.next_tokens < NUM_CHOICES)).all()


def make_steps(most: int, *, ends: Sequence[int] = (), seconds: float = 1e9) -> Steps:
    return Steps(most, seconds, torch.tensor(list(ends), dtype=torch.int64))


def begin(model: Transformer) -> tuple[Paged, list[Tensor]]:
    """Three sequences that have run their prompts, and the best token of each."""
    paged = Paged(model, 3)
    prompts = [make_tokens(length, seed=length) for length in (9, 30, 16)]
    rows = torch.tensor([8, 38, 54])
    return paged, list(paged.run(prompts, rows=rows).next_tokens[0].split(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("counts", [None, torch.tensor(EXPERTS)], ids=str)
def test_several_steps_are_as_many_calls(
    window: int | None, dtype: torch.dtype, counts: Tensor | None
) -> None:
    model = make_model(make_config(sliding_window=window)).to(dtype)
    (one, tokens), (all_at_once, _) = begin(model), begin(model)
    found = all_at_once.run(tokens, counts=counts, steps=make_steps(7))
    assert len(found.next_tokens) == len(found.is_finite) == len(found.experts) == 7
    assert found.is_finite.all()
    for step in range(7):
        expected = one.run(tokens, counts=counts)
        tokens = list(expected.next_tokens[0].split(1))
        assert torch.equal(found.next_tokens[step], expected.next_tokens[0])
        assert torch.equal(found.experts[step], expected.experts[0])
    for name in ("hidden", "weights", "router_logits", "logits"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    for table, length in zip(one.tables, one.lengths, strict=True):  # what is in the cache
        last = range(length - 7, length)
        blocks, slots = table[[p // BLOCK_SIZE for p in last]], [p % BLOCK_SIZE for p in last]
        ours, theirs = (paged.pool[:, :, blocks, :, slots] for paged in (all_at_once, one))
        assert torch.equal(ours, theirs)


def test_drawn_tokens_are_those_of_the_kernel_that_draws() -> None:
    """Of the first columns of wider scores; a row at temperature 0 takes the best."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand((5, 3), dtype=torch.float64, generator=generator)
    draws = Draws(
        torch.tensor([0.0, 0.8, 1.5]), torch.tensor([0, 20, 0]), torch.tensor([1.0, 1.0, 0.9]),
        torch.tensor([0.0, 0.0, 0.05]), numbers,
    )  # fmt: skip
    model = make_model()
    (one, tokens), (all_at_once, _) = begin(model), begin(model)
    steps = make_steps(5)._replace(draws=draws)
    found = all_at_once.run(tokens, steps=steps).next_tokens
    for step in range(5):
        scores = one.run(tokens).logits[:, :NUM_CHOICES]
        expected = native.sample_tokens(scores, *draws[:4], draws.numbers[step])
        assert torch.equal(found[step], expected)
        tokens = list(expected.split(1))


def test_steps_end_after_a_token_that_ends_a_sequence() -> None:
    model = make_model()
    paged, tokens = begin(model)
    best = paged.run(tokens, steps=make_steps(7)).next_tokens.tolist()
    for sequence in range(3):
        for step in range(7):
            end = best[step][sequence]
            first = next(i for i, row in enumerate(best) if end in row)
            paged, tokens = begin(model)
            found = paged.run(tokens, steps=make_steps(7, ends=[999, end]))
            assert found.next_tokens.tolist() == best[: first + 1]
            assert len(found.experts) == len(found.is_finite) == first + 1


def test_steps_end_when_their_time_is_over() -> None:
    paged, tokens = begin(make_model())
    assert len(paged.run(tokens, steps=make_steps(7, seconds=0.0)).next_tokens) == 1


def test_steps_end_with_scores_that_are_not_finite() -> None:
    """A token that is chosen for the first time after a few steps has a broken embedding."""
    model = make_model()
    paged, tokens = begin(model)
    best = paged.run(tokens, steps=make_steps(7)).next_tokens.tolist()
    seen = {int(token) for token in tokens}.union(*best[:2])
    step, token = next((s, t) for s, row in enumerate(best) for t in row if t not in seen)
    assert 2 <= step < 6
    paged, tokens = begin(model)
    model.tok_embeddings.weight[token] = float("nan")
    found = paged.run(tokens, steps=make_steps(7))
    assert found.next_tokens[: step + 1].tolist() == best[: step + 1]
    assert found.is_finite.all(-1).tolist() == [True] * (step + 1) + [False]


@pytest.mark.parametrize("rows", [[0, 1], [1, 0, 2], []], ids=str)
def test_several_steps_need_the_scores_of_each_sequence(rows: list[int]) -> None:
    paged, tokens = begin(make_model())
    with pytest.raises(ValueError, match="each sequence brings one token"):
        paged.run(tokens, rows=torch.tensor(rows, dtype=torch.int64), steps=make_steps(2))


def test_several_steps_need_one_token_of_each_sequence() -> None:
    paged = Paged(make_model(), 2)
    with pytest.raises(ValueError, match="each sequence brings one token"):
        paged.run([make_tokens(2), make_tokens(1)], steps=make_steps(2))


def test_steps_beyond_the_blocks_are_refused() -> None:
    paged = Paged(make_model(), 1)
    paged.run([make_tokens(94)])
    with pytest.raises(ValueError, match="too few blocks"):
        paged.run([make_tokens(1)], steps=make_steps(3))


def test_there_is_no_such_token() -> None:
    paged = Paged(make_model(), 1)
    for token in (-1, 128, NOWHERE):
        with pytest.raises(IndexError, match="no such token"):
            paged.run([torch.tensor([3, token])])


def test_numbers_that_do_not_fit_together_are_refused() -> None:
    model = make_model()
    paged = Paged(model, 1)
    tokens, pool = make_tokens(4), CachePool.locate(paged.pool)

    def run(queries: int = 4, keys: int = 4, size: int = 16, **given: list[int]) -> None:
        tensors = {name: torch.tensor(value) for name, value in given.items()}
        paged.decoder.run(
            tokens, pool._replace(block_size=size), torch.tensor([queries]), torch.tensor([keys]),
            paged.tables, *paged.rope, **tensors,
        )  # fmt: skip

    run()
    for wrong, message in [
        ({"keys": 3}, "fewer keys than queries"),
        ({"queries": -1}, "fewer keys than queries"),
        ({"queries": 3}, "not as many tokens"),
        ({"keys": 97}, "too few blocks"),
        ({"size": 24}, "no multiple of 16"),
        ({"keys": 100, "size": 32}, "more keys than there are angles"),
        ({"rows": [0, 4]}, "no such row"),
        ({"rows": [-1]}, "no such row"),
        ({"counts": [1, 2, 0, 1]}, "no number of experts"),
        ({"counts": [1, 2, 9, 1]}, "not so many experts"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(**wrong)


def test_time_is_counted_for_each_part() -> None:
    paged = Paged(make_model(), 1)
    before = paged.decoder.list_seconds()
    assert set(before.values()) == {0.0}
    paged.run([make_tokens(5)], rows=torch.empty(0, dtype=torch.int64))
    assert paged.decoder.list_seconds()["head"] == 0
    paged.run([make_tokens(5)])
    assert all(seconds > 0 for seconds in paged.decoder.list_seconds().values())
