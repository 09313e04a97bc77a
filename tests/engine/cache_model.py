"""A cache whose content can be looked at, and sequences that write to it: what must always hold.

In place of keys and values, the slot of position p holds what they depend on: the root of the
sequence and all its tokens up to p. So a block that is shared wrongly, freed too early or copied
too late holds the wrong thing, and reading it says so.
"""

from dataclasses import dataclass, field

from tramontane.engine.block_manager import FREED, BlockManager, CachedBlock


@dataclass(eq=False)
class Owner:
    token_ids: list[int]
    cache_root: tuple | None
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_freed_blocks: int = 0
    cache_chain: list[CachedBlock] = field(default_factory=list)

    def describe(self, position: int) -> tuple:
        return (self.cache_root, *self.token_ids[: position + 1])


class CheckedCache:
    """A block manager, and the content of its blocks."""

    def __init__(self, blocks: BlockManager) -> None:
        self.blocks = blocks
        self.slots: list[list[tuple | None]] = [
            [None] * blocks.block_size for _ in range(blocks.num_blocks)
        ]
        self.owners: list[Owner] = []

    def start(self, owner: Owner) -> int:
        num_kept = self.blocks.match_prefix(owner)
        self.owners.append(owner)
        self.read(owner, owner.num_computed_tokens)
        return num_kept

    def run(self, owner: Owner, num_tokens: int) -> bool:
        """One pass: reserve, copy, write, read, commit. False if there was no room."""
        is_possible = self.blocks.count_missing(owner, num_tokens) <= self.blocks.num_free
        assert self.blocks.reserve(owner, num_tokens) == is_possible
        self.copy()
        if not is_possible:
            return False
        for position in range(owner.num_computed_tokens, owner.num_computed_tokens + num_tokens):
            block, offset = divmod(position, self.blocks.block_size)
            self.slots[owner.block_table[block]][offset] = owner.describe(position)
        owner.num_computed_tokens += num_tokens
        if num_tokens > 0:
            self.read(owner, owner.num_computed_tokens - 1)
        self.blocks.commit(owner)
        return True

    def reserve_ahead(self, owners: list[Owner], num_tokens: int) -> bool:
        """As before several steps in one call: each has the place of its next token."""
        is_possible = all(self.blocks.reserve(owner, 1) for owner in owners)
        self.copy()
        if not is_possible:
            return False
        num_kept, num_free = len(self.blocks._content), self.blocks.num_free
        tables = [list(owner.block_table) for owner in owners]
        is_done = self.blocks.reserve_ahead(owners, num_tokens)
        assert self.blocks.take_copies() == []
        assert len(self.blocks._content) == num_kept
        if not is_done:
            assert [owner.block_table for owner in owners] == tables
        elif num_free > self.blocks.num_free:
            assert self.blocks.num_free >= len(owners)
        for owner in owners if is_done else ():
            end = owner.num_computed_tokens + num_tokens
            assert len(owner.block_table) * self.blocks.block_size >= end
        return is_done

    def copy(self) -> None:
        """What the next pass does first."""
        for source, target in self.blocks.take_copies():
            self.slots[target] = list(self.slots[source])

    def fork(self, owner: Owner) -> Owner:
        child = Owner(list(owner.token_ids), owner.cache_root)
        self.blocks.fork(owner, child)
        self.owners.append(child)
        self.read(child, child.num_computed_tokens)
        return child

    def end(self, owner: Owner) -> None:
        self.blocks.free(owner)
        self.owners.remove(owner)

    def read(self, owner: Owner, query: int) -> None:
        """All that a query at this position sees, as far as it has been computed, is there."""
        window = self.blocks.window
        first = max(0, query + 1 - window) if window else 0
        for position in range(first, owner.num_computed_tokens):
            block, offset = divmod(position, self.blocks.block_size)
            assert owner.block_table[block] != FREED
            assert self.slots[owner.block_table[block]][offset] == owner.describe(position)

    def check(self) -> None:
        self.blocks.check_integrity(self.owners)
        for owner in self.owners:
            self.read(owner, owner.num_computed_tokens)
