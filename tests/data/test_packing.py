"""Rows are full, targets are the next ids, no token is lost, and a stream can be resumed."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.files import make_stories
from tramontane.data.packing import HeldOutBatch, PackedBatch, PackedStream, iterate_held_out
from tramontane.data.token_files import TokenFile
from tramontane.errors import ConfigError, DataError

MakeFiles = Callable[[dict[str, list[str]]], dict[str, TokenFile]]


def make_file(documents: list[list[int]], *, domain: str = "a") -> TokenFile:
    """A token file in memory; ids should tell documents apart."""
    lengths = [len(document) for document in documents]
    return TokenFile(
        domain=domain,
        split="train",
        fingerprint="f",
        tokens=np.array([i for document in documents for i in document], dtype=np.uint16),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        byte_counts=np.array([10 * length for length in lengths], dtype=np.int64),
    )


def number_documents(lengths: list[int]) -> list[list[int]]:
    """Document d of n inputs -> <s>, n - 1 ids that occur nowhere else, </s>."""
    starts = np.cumsum([10, *lengths])
    return [[1, *range(start, start + n - 1), 2] for start, n in zip(starts, lengths, strict=False)]


def make_stream(files: dict[str, TokenFile], **changes: Any) -> PackedStream:
    values: dict[str, Any] = {"seq_len": 16, "batch_size": 3, "seed": 5} | changes
    weights = values.pop("weights", dict.fromkeys(files, 1.0))
    return PackedStream(files, weights, **values)


def list_segments(batch: PackedBatch) -> list[tuple[str, list[int], list[int]]]:
    ends = np.cumsum(batch.seqlens)[:-1]
    parts = zip(np.split(batch.tokens, ends), np.split(batch.targets, ends), strict=True)
    return [
        (domain, tokens.tolist(), targets.tolist())
        for domain, (tokens, targets) in zip(batch.domains, parts, strict=True)
    ]


def assert_equal_batches(first: PackedBatch, second: PackedBatch) -> None:
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.targets, second.targets)
    assert first[2:] == second[2:]


@given(
    lengths=st.lists(st.integers(2, 50), min_size=1, max_size=12),
    seq_len=st.integers(1, 40),
    batch_size=st.integers(1, 4),
)
def test_an_epoch_gives_every_pair_of_ids_once(
    lengths: list[int], seq_len: int, batch_size: int
) -> None:
    documents = number_documents(lengths)
    stream = make_stream({"a": make_file(documents)}, seq_len=seq_len, batch_size=batch_size)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < sum(lengths):
        batch = stream.next_batch()
        assert batch.tokens.shape == batch.targets.shape == (batch_size * seq_len,)
        assert batch.tokens.dtype == batch.targets.dtype == np.int64
        row_starts = set(range(0, batch_size * seq_len, seq_len))
        assert row_starts <= {0, *np.cumsum(batch.seqlens).tolist()}  # no segment crosses a row
        for _, tokens, targets in list_segments(batch):
            assert targets[:-1] == tokens[1:]
        pairs += zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    expected = Counter(pair for d in documents for pair in pairwise(d))
    assert Counter(pairs[: sum(lengths)]) == expected


def test_targets_are_the_next_ids_also_across_a_cut() -> None:
    stream = make_stream({"a": make_file([[1, 10, 11, 12, 13, 2]])}, seq_len=3, batch_size=2)
    batch = stream.next_batch()
    assert list_segments(batch) == [("a", [1, 10, 11], [10, 11, 12]), ("a", [12, 13], [13, 2]),
                                    ("a", [1], [10])]  # fmt: skip
    assert batch.seqlens == (3, 2, 1)


def test_batches_decode_to_documents_of_the_file(make_files: MakeFiles, tokenizer: Any) -> None:
    stories = make_stories(20, max_words=5)
    stream = make_stream(make_files({"tales": stories}), seq_len=200, batch_size=1)
    _, tokens, targets = list_segments(stream.next_batch())[0]
    assert tokens[0] == tokenizer.bos_id
    assert targets[-1] == tokenizer.eos_id
    assert tokenizer.decode(tokens) in stories


def read_epochs(stream: PackedStream, *, num_documents: int, count: int) -> list[list[int]]:
    """The first id after <s> of each document, epoch by epoch."""
    firsts: list[int] = []
    while len(firsts) < num_documents * count:
        for _, tokens, targets in list_segments(stream.next_batch()):
            firsts += targets[:1] if tokens[0] == 1 else []
    return [firsts[i * num_documents : (i + 1) * num_documents] for i in range(count)]


def test_each_epoch_has_every_document_in_its_own_order() -> None:
    files = {"a": make_file(number_documents([5] * 30))}
    epochs = read_epochs(make_stream(files), num_documents=30, count=3)
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs == read_epochs(make_stream(files), num_documents=30, count=3)
    assert epochs != read_epochs(make_stream(files, seed=6), num_documents=30, count=3)


def test_the_order_is_the_one_that_runs_were_saved_with() -> None:
    # Another order here would let saved runs go on with other text, in silence.
    files = {"a": make_file(number_documents([2] * 8))}
    epoch = read_epochs(make_stream(files, seed=0), num_documents=8, count=1)[0]
    assert epoch == [16, 24, 22, 12, 18, 10, 20, 14]


def test_numpy_state_is_left_alone() -> None:
    before = np.random.get_state()[1].tolist()
    make_stream({"a": make_file(number_documents([5] * 30))}).next_batch()
    assert np.random.get_state()[1].tolist() == before


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=5),
    num_batches=st.integers(1, 60),
)
def test_shares_are_exact_up_to_a_row(weights: list[float], num_batches: int) -> None:
    by_domain = {f"d{number}": weight for number, weight in enumerate(weights)}
    files = {
        domain: make_file(number_documents([3, 40, 7 * number + 2]), domain=domain)
        for number, domain in enumerate(by_domain)
    }
    stream = make_stream(files, weights=by_domain, seq_len=16, batch_size=2)
    batches = [stream.next_batch() for _ in range(num_batches)]
    given_tokens = Counter[str]()
    for batch in batches:
        for domain, tokens, _ in list_segments(batch):
            given_tokens[domain] += len(tokens)
    assert given_tokens == Counter(stream.tokens_by_domain)
    total = num_batches * 32
    for domain, weight in by_domain.items():
        share = weight / sum(weights)
        assert abs(given_tokens[domain] - share * total) <= 16 * len(weights)


def test_the_heaviest_domain_comes_first() -> None:
    files = {name: make_file(number_documents([20]), domain=name) for name in "abc"}
    batch = make_stream(files, weights={"a": 1, "b": 5, "c": 2}).next_batch()
    assert batch.domains[0] == "b"


@pytest.mark.parametrize("num_before", [0, 1, 7, 40])
def test_a_resumed_stream_goes_on_bit_for_bit(make_files: MakeFiles, num_before: int) -> None:
    files = make_files({"a": make_stories(12), "b": make_stories(5, seed=1), "c": ["x " * 300]})
    weights = {"a": 1.0, "b": 0.3, "c": 2.0}
    unbroken = make_stream(files, weights=weights)
    for _ in range(num_before):
        unbroken.next_batch()
    saved = json.loads(json.dumps(unbroken.state()))
    reordered = dict(reversed(files.items()))
    resumed = make_stream(reordered, weights=weights)
    resumed.next_batch()
    resumed.load_state(saved)
    for _ in range(40):
        assert_equal_batches(unbroken.next_batch(), resumed.next_batch())
    assert unbroken.state() == resumed.state()


def test_a_state_of_other_data_is_refused(make_files: MakeFiles) -> None:
    stories = {"a": make_stories(12), "b": make_stories(5, seed=1)}
    files = make_files(stories)
    state = make_stream(files).state()
    changed = make_files(stories | {"b": make_stories(6, seed=1)})
    with pytest.raises(DataError, match="other text or another tokenizer in b:"):
        make_stream(changed).load_state(state)
    with pytest.raises(DataError, match="in a:"):
        make_stream({"b": files["b"]}).load_state(state)
    with pytest.raises(DataError, match="seed 5, not 6"):
        make_stream(files, seed=6).load_state(state)


def test_files_and_weights_must_fit() -> None:
    file = make_file(number_documents([4]))
    with pytest.raises(ConfigError, match="no token file"):
        make_stream({})
    with pytest.raises(ConfigError, match=r"weights are given for \['b'\].*files for \['a'\]"):
        make_stream({"a": file}, weights={"b": 1.0})
    with pytest.raises(ConfigError, match="domain a: weight is 0"):
        make_stream({"a": file}, weights={"a": 0})
    with pytest.raises(DataError, match="domain a holds no train document"):
        make_stream({"a": make_file([])})


def join_held_out(batches: list[HeldOutBatch]) -> list[tuple[int, int]]:
    return [
        pair
        for batch, _ in batches
        for pair in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    ]


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=12),
    seq_len=st.integers(1, 40),
    max_tokens=st.integers(1, 400),
)
def test_held_out_batches_are_whole_documents_with_their_bytes(
    lengths: list[int], seq_len: int, max_tokens: int
) -> None:
    documents = number_documents(lengths)
    file = make_file(documents)
    batches = list(iterate_held_out(file, seq_len=seq_len, max_tokens=max_tokens))
    count = max(1, sum(np.cumsum(lengths) <= max_tokens))
    expected = [pair for d in documents[:count] for pair in pairwise(d)]
    assert join_held_out(batches) == expected
    assert sum(num_bytes for _, num_bytes in batches) == file.byte_counts[:count].sum()
    for batch, _ in batches:
        assert 0 < len(batch.tokens) <= seq_len
        assert sum(batch.seqlens) == len(batch.tokens)


def test_held_out_documents_are_cut_only_if_longer_than_a_row() -> None:
    file = make_file(number_documents([6, 6, 23]))
    batches = [batch.seqlens for batch, _ in iterate_held_out(file, seq_len=10, max_tokens=100)]
    assert batches == [(6,), (6,), (10,), (10,), (3,)]
