"""Blocks on demand, shared, copied on write, kept and evicted (rows K01, K02, K11, K12)."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.engine.cache_model import CheckedCache, Owner
from tramontane.engine.block_manager import FREED, BlockManager
from tramontane.errors import CapacityError

ROOT = ("tenant", None)


def make_owner(length: int, *, seed: int = 0, root: tuple | None = ROOT) -> Owner:
    return Owner(random.Random(seed).choices(range(50), k=length), root)


def run_whole(blocks: BlockManager, owner: Owner) -> int:
    """Start, run all tokens and commit; returns how many were kept from before."""
    num_kept = blocks.match_prefix(owner)
    assert blocks.reserve(owner, len(owner.token_ids) - num_kept)
    owner.num_computed_tokens = len(owner.token_ids)
    blocks.commit(owner)
    return num_kept


def test_blocks_come_on_demand_and_waste_less_than_one():
    blocks = BlockManager(10, block_size=4)
    owner = make_owner(40)
    for length in range(1, 41):
        assert blocks.reserve(owner, 1)
        owner.num_computed_tokens = length
        assert len(owner.block_table) * 4 - length <= 3
    assert blocks.num_free == 0
    assert not blocks.reserve(owner, 1)
    blocks.free(owner)
    assert blocks.num_free == 10


def test_a_prompt_that_begins_alike_takes_the_blocks_that_are_kept():
    blocks = BlockManager(20, block_size=4)
    first = make_owner(11)
    assert run_whole(blocks, first) == 0
    second = Owner([*first.token_ids[:8], 99, 98, 97], ROOT)
    assert run_whole(blocks, second) == 8
    assert second.block_table[:2] == first.block_table[:2]
    blocks.free(first)
    blocks.free(second)
    assert run_whole(blocks, Owner(list(first.token_ids), ROOT)) == 8


def test_the_last_token_always_runs():
    blocks = BlockManager(20, block_size=4)
    owner = make_owner(8)
    run_whole(blocks, owner)
    assert blocks.match_prefix(Owner(list(owner.token_ids), ROOT)) == 4


@pytest.mark.parametrize("root", [("other", None), ("tenant", 1), None])
def test_other_tenants_and_numbers_of_experts_find_nothing(root):
    """A03: what one tenant's prompts left, another cannot even notice."""
    blocks = BlockManager(20, block_size=4)
    owner = make_owner(12)
    run_whole(blocks, owner)
    assert run_whole(blocks, Owner(list(owner.token_ids), root)) == 0


def test_a_digest_that_collides_is_not_believed(monkeypatch):
    class SameDigest:
        def digest(self):
            return b"same"

    monkeypatch.setattr(
        "tramontane.engine.block_manager.hashlib.blake2b", lambda *_, **__: SameDigest()
    )
    cache = CheckedCache(BlockManager(30, block_size=4))
    owners = [make_owner(13, seed=seed) for seed in range(5)]
    for owner in owners:
        assert cache.start(owner) == 0
        assert cache.run(owner, 13)
        cache.check()


def test_what_stands_behind_a_lost_block_is_not_in_the_way():
    """Block 0 is written over before block 1; computed again, both are found again."""
    blocks = BlockManager(5, block_size=4, window=4)
    owner, other = make_owner(12), make_owner(12, seed=1)
    run_whole(blocks, owner)
    blocks.free(owner)
    assert blocks.reserve(other, 12)  # the blank blocks, and the longest unused: block 0
    blocks.free(other)
    for num_kept in (0, 8):
        again = Owner(list(owner.token_ids), ROOT)
        assert run_whole(blocks, again) == num_kept
        blocks.free(again)


def test_what_is_kept_can_be_forgotten():
    blocks = BlockManager(10, block_size=4)
    owner = make_owner(12)
    run_whole(blocks, owner)
    blocks.free(owner)
    blocks.forget_kept()
    blocks.check_integrity([])
    assert run_whole(blocks, Owner(list(owner.token_ids), ROOT)) == 0


def test_digests_are_keyed():
    """Without the secret nobody can compute which prompts share a digest."""
    digests = []
    for _ in range(2):
        blocks, owner = BlockManager(4, block_size=4), make_owner(8)
        run_whole(blocks, owner)
        digests.append(owner.cache_chain[0].digest)
    assert digests[0] != digests[1]


def test_forks_share_and_copy_on_write():
    """K11: eight forks hold the prompt once; each that writes gets its own last block."""
    cache = CheckedCache(BlockManager(40, block_size=4))
    owner = make_owner(10)
    cache.start(owner)
    cache.run(owner, 10)
    children = [cache.fork(owner) for _ in range(7)]
    assert cache.blocks.num_free == 40 - 3
    for number, one in enumerate([owner, *children]):
        one.token_ids.append(number)
        assert cache.run(one, 1)
        cache.check()
    tables = [one.block_table for one in [owner, *children]]
    assert {tuple(table[:2]) for table in tables} == {tuple(owner.block_table[:2])}
    assert len({table[2] for table in tables}) == 8
    for one in [children[3], owner, *children[:3], *children[4:]]:
        cache.end(one)
        cache.check()
    assert cache.blocks.num_free == 40


def test_blocks_ahead_are_taken_of_those_that_hold_nothing():
    cache = CheckedCache(BlockManager(8, block_size=4))
    gone, first, second = make_owner(8, seed=1), make_owner(6, seed=2), make_owner(7, seed=3)
    for owner in (gone, first, second):
        cache.start(owner)
        assert cache.run(owner, len(owner.token_ids))
    cache.end(gone)  # two blocks are kept for others, two hold nothing
    assert not cache.reserve_ahead([first, second], 5)  # it would take both
    assert cache.reserve_ahead([first], 6)
    assert run_whole(cache.blocks, Owner([*gone.token_ids, 1], ROOT)) == 8


def test_a_fork_shares_what_has_been_computed_alone():
    cache = CheckedCache(BlockManager(8, block_size=4))
    owner = make_owner(4)
    cache.start(owner)
    assert cache.run(owner, 4)
    assert cache.reserve_ahead([owner], 3)
    child = cache.fork(owner)
    assert (len(owner.block_table), len(child.block_table)) == (2, 1)
    for one in (owner, child):
        one.token_ids.append(one is child)
        assert cache.run(one, 1)
    cache.check()


def test_the_longest_unused_block_is_evicted_first():
    blocks = BlockManager(6, block_size=4)
    old, new = make_owner(9, seed=1), make_owner(9, seed=2)
    for owner in (old, new):
        run_whole(blocks, owner)
    for owner in (old, new):
        blocks.free(owner)
    third = make_owner(13, seed=3)  # four blocks: two blank ones, and two of the oldest
    run_whole(blocks, third)
    blocks.free(third)
    assert blocks.match_prefix(Owner([*new.token_ids], ROOT)) == 8
    assert blocks.match_prefix(Owner([*old.token_ids], ROOT)) < 8


def test_blocks_behind_the_window_are_freed():
    blocks = BlockManager(100, block_size=4, window=8)
    owner = make_owner(100)
    for length in range(1, 101):
        assert blocks.reserve(owner, 1)
        owner.num_computed_tokens = length
        blocks.commit(owner)
        held = [block for block in owner.block_table if block != FREED]
        assert len(held) <= blocks.count_blocks(length)
        assert len(held) * 4 >= min(length, 8)


def test_metadata_is_bounded_by_the_pool():
    """K12: many unique prompts leave no more entries than there are blocks."""
    blocks = BlockManager(16, block_size=4)
    for seed in range(500):
        owner = make_owner(20, seed=seed)
        run_whole(blocks, owner)
        blocks.free(owner)
        assert len(blocks._content) == len(blocks._block_of_digest) <= 16
    blocks.check_integrity([])


def test_nothing_is_kept_where_that_is_switched_off():
    blocks = BlockManager(20, block_size=4, use_prefix_cache=False)
    owner = make_owner(12)
    run_whole(blocks, owner)
    assert run_whole(blocks, Owner(list(owner.token_ids), ROOT)) == 0
    assert blocks._content == {}


def test_a_block_freed_twice_is_an_error():
    blocks, owner = BlockManager(4, block_size=4), make_owner(4)
    run_whole(blocks, owner)
    table = list(owner.block_table)
    blocks.free(owner)
    owner.block_table[:] = table
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free(owner)


@pytest.mark.parametrize("call", range(1, 12))
def test_an_allocation_that_fails_loses_nothing(call, monkeypatch):
    """K10: whatever call of the allocator raises, freeing the owner restores all blocks."""
    cache = CheckedCache(BlockManager(20, block_size=4))
    allocate, num_calls = BlockManager._allocate, 0

    def fail_once(self):
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            raise MemoryError
        return allocate(self)

    monkeypatch.setattr(BlockManager, "_allocate", fail_once)
    owner = make_owner(30)
    cache.start(owner)
    try:
        cache.run(owner, 10)
        child = cache.fork(owner)
        child.token_ids[10:] = [7] * 20
        cache.run(child, 20)
    except MemoryError:
        for one in list(cache.owners):
            cache.end(one)
    cache.check()


def test_no_block_is_left():
    blocks, owner = BlockManager(1, block_size=4), make_owner(4)
    run_whole(blocks, owner)
    with pytest.raises(CapacityError, match="all 1 blocks"):
        blocks._allocate()


class BlockMachine(RuleBasedStateMachine):
    """Any order of what an engine does; prompts over two letters, so that many begin alike."""

    window: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.cache = CheckedCache(BlockManager(24, block_size=4, window=self.window))

    @rule(
        letters=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        tenant=st.sampled_from("ab"),
    )
    def start(self, letters, tenant):
        self.cache.start(Owner(letters, (tenant, None)))

    @precondition(lambda self: self.cache.owners)
    @rule(data=st.data(), letter=st.integers(0, 1), most=st.integers(1, 12))
    def run_tokens(self, data, letter, most):
        owner = data.draw(st.sampled_from(self.cache.owners))
        if owner.num_computed_tokens == len(owner.token_ids):
            owner.token_ids.append(letter)
        pending = len(owner.token_ids) - owner.num_computed_tokens
        self.cache.run(owner, min(pending, most, self.cache.blocks.count_room(owner)))

    @precondition(lambda self: self.cache.owners)
    @rule(data=st.data(), most=st.integers(2, 9))
    def reserve_ahead(self, data, most):
        some = st.lists(st.sampled_from(self.cache.owners), min_size=1, max_size=4, unique=True)
        self.cache.reserve_ahead(data.draw(some), most)

    @precondition(lambda self: self.cache.owners)
    @rule(data=st.data())
    def fork(self, data):
        self.cache.fork(data.draw(st.sampled_from(self.cache.owners)))

    @precondition(lambda self: self.cache.owners)
    @rule(data=st.data())
    def end_or_cancel(self, data):
        self.cache.end(data.draw(st.sampled_from(self.cache.owners)))

    @precondition(lambda self: self.cache.owners)
    @rule(data=st.data())
    def preempt_and_start_again(self, data):
        owner = data.draw(st.sampled_from(self.cache.owners))
        self.cache.end(owner)
        self.cache.start(owner)

    @invariant()
    def holds(self):
        self.cache.check()

    def teardown(self):
        for owner in list(self.cache.owners):
            self.cache.end(owner)
        self.cache.check()
        assert self.cache.blocks.num_free == self.cache.blocks.num_blocks


class WindowMachine(BlockMachine):
    window = 6


def test_a_prompt_that_ends_just_behind_a_block_that_nothing_sees_any_more():
    """The query at 9 sees 4 .. 9 through a window of 6: the block of 0 .. 3 goes."""
    cache = CheckedCache(BlockManager(24, block_size=4, window=6))
    owner = make_owner(9)
    cache.start(owner)
    assert cache.run(owner, 9)
    assert owner.block_table[0] == FREED
    assert FREED not in owner.block_table[1:]
    cache.check()


FEW = settings(max_examples=40, stateful_step_count=40)
MANY = settings(max_examples=5000, stateful_step_count=200)


@pytest.mark.parametrize("machine", [BlockMachine, WindowMachine])
def test_any_order_of_operations(machine):
    """K02, a part of it."""
    run_machine(machine, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [BlockMachine, WindowMachine])
def test_any_order_of_operations_5000_times_200(machine):
    """K02."""
    run_machine(machine, MANY)


def run_machine(machine, some_settings):
    run_state_machine_as_test(machine, settings=some_settings)
