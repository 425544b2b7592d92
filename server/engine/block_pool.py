"""Which cache block belongs to whom: bookkeeping by block id, no tensor.

Every block is free or referenced. A free block keeps its content, and can be found by it, until it
is given out again; the longest unused goes first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple


class PrefixKey(NamedTuple):
    """What makes a full block reusable: its own tokens, and all that comes before it.

    A dict keyed by this finds a block by hash and then compares the token ids themselves; what comes before
    stands in it as a cryptographic digest. So no collision of hashes can hand one request another's text, and
    a block can be found where those before it were given back, behind a window.
    """

    parent: bytes
    tokens: tuple[int, ...]

    @property
    def content(self) -> bytes:
        """Names what a block holds, as the parent of the next one (BLAKE2, RFC 7693)."""
        return blake2b(self.parent + array("q", self.tokens).tobytes(), digest_size=32).digest()


def root_of(adapter: int) -> bytes:
    """The parent of the first block under an adapter: the same tokens have other keys and values there."""
    return adapter.to_bytes(32)


@dataclass(slots=True)
class Block:
    """One block's state; its id is its index in the pool."""

    references: int = 0
    key: PrefixKey | None = None
    """What it holds, once it is findable."""


class BlockPool:
    """Gives out, shares and takes back the blocks of one cache group: `num_blocks` of `block_size` tokens.

    In a group with a `window` a row sees so many positions, its own included.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, window: int | None = None, prefix_cache: bool = True
    ) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.window = window
        self.prefix_cache = prefix_cache
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: dict[PrefixKey, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, with or without content worth keeping."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one request holds."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, or none at all if there are not so many."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            block = self._blocks[block_id]
            if block.key is not None:
                del self._cached[block.key]
                block.key = None
            block.references = 1
            taken.append(block_id)
        return taken

    def references(self, block_id: int) -> int:
        """How many sequences hold a block."""
        return self._blocks[block_id].references

    def find(self, key: PrefixKey) -> int | None:
        """The block that holds this content, if there is one; nobody need hold the block."""
        return self._cached.get(key)

    def share(self, block_ids: Sequence[int]) -> None:
        """Take a share of blocks that another sequence holds, or that were found."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.references == 0:
                assert block.key is not None, f"block {block_id} holds nothing"
                del self._free[block_id]
            block.references += 1

    def register(self, block_id: int, key: PrefixKey) -> None:
        """Make a full, computed block findable by what it holds.

        If another block holds the same content already, that one stays the findable one.
        """
        assert len(key.tokens) == self.block_size
        block = self._blocks[block_id]
        assert block.references > 0
        if self.prefix_cache and block.key is None and self._cached.setdefault(key, block_id) == block_id:
            block.key = key

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back one share of each block of a sequence.

        The end of a sequence becomes reusable before its beginning, which more prompts share; blocks
        without content that could be found again go before all others.
        """
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            assert block.references > 0, f"block {block_id} is free already"
            block.references -= 1
            if block.references == 0:
                self._free[block_id] = None
                if block.key is None:
                    self._free.move_to_end(block_id, last=False)

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Assert that the books agree with the block tables that are `held` (AssertionError if not)."""
        references = [0] * self.num_blocks
        for table in held:
            assert len(set(table)) == len(table), "a sequence holds a block twice"
            for block_id in table:
                references[block_id] += 1
        for block_id, block in enumerate(self._blocks):
            assert block.references == references[block_id], f"block {block_id}: wrong reference count"
            assert (block.references == 0) == (block_id in self._free), (
                f"block {block_id}: neither free nor held"
            )
            assert block.key is None or self._cached.get(block.key) == block_id, (
                f"block {block_id}: lost content"
            )
        assert len(self._cached) == sum(block.key is not None for block in self._blocks)
