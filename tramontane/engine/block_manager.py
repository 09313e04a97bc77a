"""Which blocks of the key-value cache belong to whom: on demand, shared, counted, kept for reuse.

A block holds `block_size` consecutive tokens of a sequence. Where prompts begin alike, full blocks
are shared; a block that a second owner would write to is copied first. Blocks that nobody holds
keep their content until they are needed. Source: arXiv:2309.06180, section 4.

Worked example, block size 4: a prompt of 6 tokens takes blocks [0, 1], 1 half full. A fork of it
holds the same two. The first of the two to write token 6 gets a copy, block 2, and the other keeps
1 for itself. When both have ended, block 0 stays as "tokens 0 .. 3 of such a prompt".
"""

import hashlib
import secrets
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from tramontane.errors import CapacityError

BLOCK_SIZE = 16
FREED = -1  # in a block table: a block behind the window, which nothing reads any more


class BlockOwner(Protocol):
    """What the manager knows of a sequence.

    `block_table[i]` holds tokens i * block_size and on; the first `num_computed_tokens` of
    `token_ids` are in them. `cache_root` is equal for those who may share; None: shares nothing.
    """

    token_ids: list[int]
    num_computed_tokens: int
    block_table: list[int]
    num_freed_blocks: int
    cache_root: tuple | None
    cache_chain: list["CachedBlock"]


class CachedBlock(NamedTuple):
    """What a block holds, to be found by `digest` and then compared: digests could collide.

    `node` is its own number, never used again; `parent` is the number of the block before it, or
    the root of its sequence.
    """

    digest: bytes
    parent: int | tuple
    token_ids: tuple[int, ...]
    node: int


class BlockManager:
    """Hands out the blocks 0 .. num_blocks - 1.

    With a sliding `window`, blocks that no later token sees are freed. `secret` keys the digests,
    so that nobody can construct two prompts of the same one.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        block_size: int = BLOCK_SIZE,
        window: int | None = None,
        use_prefix_cache: bool = True,
        secret: bytes | None = None,
    ) -> None:
        assert num_blocks > 0, num_blocks
        self.num_blocks, self.block_size, self.window = num_blocks, block_size, window
        self._use_prefix_cache = use_prefix_cache
        self._secret = secret or secrets.token_bytes(32)
        self._ref_counts = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))  # free blocks without content
        self._idle: dict[int, None] = {}  # free blocks with content, the longest unused first
        self._block_of_digest: dict[bytes, int] = {}
        self._content: dict[int, CachedBlock] = {}
        self._num_nodes = 0
        self._copies: list[tuple[int, int]] = []

    @property
    def num_free(self) -> int:
        """Blocks that may be taken: nobody holds them."""
        return len(self._blank) + len(self._idle)

    def count_blocks(self, num_tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds at the most at one time."""
        if self.window is not None:
            # The window may begin inside a block, and a chunk is written before blocks are freed.
            num_tokens = min(num_tokens, self.window + 2 * self.block_size)
        return -(-num_tokens // self.block_size)

    @property
    def longest(self) -> int:
        """The most tokens that a sequence may have; no number is too large behind a window."""
        held = self.num_blocks * self.block_size
        return held if self.count_blocks(held + 1) > self.num_blocks else sys.maxsize

    def count_missing(self, owner: BlockOwner, num_tokens: int) -> int:
        """Free blocks that `reserve` would take."""
        end = owner.num_computed_tokens + num_tokens
        missing = max(0, -(-end // self.block_size) - len(owner.block_table))
        return missing + self._must_copy(owner, num_tokens)

    def count_room(self, owner: BlockOwner) -> int:
        """Tokens that `reserve` could make room for."""
        num_blocks = len(owner.block_table) + self.num_free - self._must_copy(owner, 1)
        return max(0, num_blocks * self.block_size - owner.num_computed_tokens)

    def match_prefix(self, owner: BlockOwner) -> int:
        """Give a sequence that holds nothing the kept blocks its tokens begin with.

        Returns the number of tokens in them, at least one less than it has: its last must run.
        """
        assert not owner.block_table, owner.block_table
        assert owner.num_computed_tokens == 0, owner.num_computed_tokens
        if owner.cache_root is None or not self._use_prefix_cache:
            return 0
        for start in range(0, len(owner.token_ids) - self.block_size, self.block_size):
            found = self._find(owner, start)
            if found is None:
                break
            self._take(found)
            owner.block_table.append(found)
            owner.cache_chain.append(self._content[found])
        owner.num_computed_tokens = len(owner.block_table) * self.block_size
        self._free_behind_window(owner)
        return owner.num_computed_tokens

    def reserve(self, owner: BlockOwner, num_tokens: int) -> bool:
        """Make room for the next `num_tokens`; False, and nothing changes, if there is none."""
        if self.count_missing(owner, num_tokens) > self.num_free:
            return False
        if self._must_copy(owner, num_tokens):
            index = owner.num_computed_tokens // self.block_size
            shared, owner.block_table[index] = owner.block_table[index], self._allocate()
            self._release(shared)
            self._copies.append((shared, owner.block_table[index]))
        end = owner.num_computed_tokens + num_tokens
        while len(owner.block_table) * self.block_size < end:
            owner.block_table.append(self._allocate())
        return True

    def reserve_ahead(self, owners: Sequence[BlockOwner], num_tokens: int) -> bool:
        """Make room for so many tokens of each, whose next one has its place already.

        Only with blocks that hold nothing, of which as many stay as there are owners: nothing kept
        is lost for tokens that may never come, and nobody has to wait for them. Else False.
        """
        missing = sum([self.count_missing(owner, num_tokens) for owner in owners])
        if missing and missing + len(owners) > len(self._blank):
            return False
        for owner in owners:
            self.reserve(owner, num_tokens)
        return True

    def take_copies(self) -> list[tuple[int, int]]:
        """Blocks (from, to) whose content is to be copied before the next pass writes."""
        copies, self._copies = self._copies, []
        return copies

    def commit(self, owner: BlockOwner) -> None:
        """After a pass: full blocks can be found by others, those behind the window are freed."""
        if owner.cache_root is not None and self._use_prefix_cache:
            num_full = owner.num_computed_tokens // self.block_size
            while len(owner.cache_chain) < num_full:
                self._register(owner)
        self._free_behind_window(owner)

    def fork(self, owner: BlockOwner, child: BlockOwner) -> None:
        """Let `child`, which holds nothing, begin with all that `owner` has computed."""
        assert not child.block_table, child.block_table
        num_used = -(-owner.num_computed_tokens // self.block_size)  # the rest is reserved
        for block in owner.block_table[owner.num_freed_blocks : num_used]:
            self._take(block)
        child.block_table[:] = owner.block_table[:num_used]
        child.cache_chain[:] = owner.cache_chain
        child.num_computed_tokens = owner.num_computed_tokens
        child.num_freed_blocks = owner.num_freed_blocks

    def free(self, owner: BlockOwner) -> None:
        """Take back all blocks; the last first, so that beginnings are kept longest."""
        for block in reversed(owner.block_table[owner.num_freed_blocks :]):
            self._release(block)
        owner.block_table.clear()
        owner.cache_chain.clear()
        owner.num_computed_tokens = owner.num_freed_blocks = 0

    def forget_kept(self) -> None:
        """No later prompt finds what blocks hold now. Nobody may hold any."""
        assert not any(self._ref_counts), "blocks are held"
        self._blank += self._idle
        self._idle.clear()
        self._content.clear()
        self._block_of_digest.clear()

    def check_integrity(self, owners: Iterable[BlockOwner]) -> None:
        """Raise AssertionError unless every block is free or held as often as it is counted."""
        held = [0] * self.num_blocks
        for owner in owners:
            assert owner.num_computed_tokens <= len(owner.block_table) * self.block_size
            assert set(owner.block_table[: owner.num_freed_blocks]) <= {FREED}, owner.block_table
            for block in owner.block_table[owner.num_freed_blocks :]:
                held[block] += 1
        assert held == self._ref_counts, (held, self._ref_counts)
        free = [*self._blank, *self._idle]
        assert sorted(free) == [b for b, count in enumerate(held) if count == 0], free
        assert not set(self._blank) & set(self._content), self._blank
        assert set(self._idle) <= set(self._content), self._idle
        assert all(self._content[b].digest == d for d, b in self._block_of_digest.items())
        assert len(self._content) == len(self._block_of_digest) <= self.num_blocks

    def _free_behind_window(self, owner: BlockOwner) -> None:
        if self.window is None:
            return
        # The next query, at num_computed_tokens, sees the last `window` keys, its own included.
        first_seen = max(0, owner.num_computed_tokens + 1 - self.window)
        while owner.num_freed_blocks < first_seen // self.block_size:
            self._release(owner.block_table[owner.num_freed_blocks])
            owner.block_table[owner.num_freed_blocks] = FREED
            owner.num_freed_blocks += 1

    def _must_copy(self, owner: BlockOwner, num_tokens: int) -> bool:
        """Whether the next token goes into a block that others hold too."""
        index, offset = divmod(owner.num_computed_tokens, self.block_size)
        if offset == 0 or num_tokens == 0 or index >= len(owner.block_table):
            return False
        return self._ref_counts[owner.block_table[index]] > 1

    def _allocate(self) -> int:
        if self._blank:
            block = self._blank.pop()
        elif self._idle:
            block = next(iter(self._idle))
            del self._idle[block]
            del self._block_of_digest[self._content.pop(block).digest]
        else:
            raise CapacityError(f"all {self.num_blocks} blocks of the cache are held")
        self._ref_counts[block] = 1
        return block

    def _take(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._idle[block]
        self._ref_counts[block] += 1

    def _release(self, block: int) -> None:
        assert self._ref_counts[block] > 0, f"block {block} is freed twice"
        self._ref_counts[block] -= 1
        if self._ref_counts[block]:
            return
        if block in self._content:
            self._idle[block] = None
        else:
            self._blank.append(block)

    def _find(self, owner: BlockOwner, start: int) -> int | None:
        """The kept block that holds the tokens from `start` on, after what the owner has."""
        wanted = self._describe(owner, start)
        block = self._block_of_digest.get(wanted.digest)
        if block is None or self._content[block][:3] != wanted[:3]:
            return None
        return block

    def _register(self, owner: BlockOwner) -> None:
        """Note what the next full block of the owner holds, unless another block has the same."""
        index = len(owner.cache_chain)
        content = self._describe(owner, index * self.block_size)
        twin = self._block_of_digest.get(content.digest)
        if twin is not None and self._content[twin][:3] == content[:3]:
            owner.cache_chain.append(self._content[twin])  # computed by two in the same pass
            return
        self._num_nodes += 1
        content = content._replace(node=self._num_nodes)
        owner.cache_chain.append(content)
        block = owner.block_table[index]
        if twin is None and block != FREED:
            self._block_of_digest[content.digest] = block
            self._content[block] = content

    def _describe(self, owner: BlockOwner, start: int) -> CachedBlock:
        """The content of the owner's block at `start`, not yet numbered."""
        token_ids = tuple(owner.token_ids[start : start + self.block_size])
        if start == 0:
            assert owner.cache_root is not None
            parent: int | tuple = owner.cache_root
        else:
            parent = owner.cache_chain[-1].node
        data = repr(parent).encode() + array("q", token_ids).tobytes()
        digest = hashlib.blake2b(data, key=self._secret, digest_size=32).digest()
        return CachedBlock(digest, parent, token_ids, 0)
