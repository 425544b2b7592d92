"""Which cache block belongs to whom: bookkeeping by block id, no tensor.

Every block is free or referenced. A free block keeps its content, and can be found by it, until it
is given out again; the longest unused goes first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class PrefixKey(NamedTuple):
    """What makes a full block reusable: its own tokens, and the content that comes before it.

    A dict keyed by this finds a block by hash and then compares the token ids themselves, so that no
    hash collision can hand one request another's text. `parent` names content, not a block: it is
    never used twice, so a key whose parent was evicted can no longer be reached.
    """

    parent: int
    tokens: tuple[int, ...]


ROOT = 0
"""The parent of a sequence's first block."""


@dataclass(slots=True)
class Block:
    """One block's state; its id is its index in the pool."""

    references: int = 0
    key: PrefixKey | None = None
    content: int = ROOT
    """Names what the block holds once it is registered, as the parent of the next block."""


class BlockPool:
    """Gives out, shares and takes back the blocks of a cache of `num_blocks` x `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cached: dict[PrefixKey, int] = {}
        self._next_content = ROOT + 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, with or without content worth keeping."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one request holds."""
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

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

    def share(self, block_ids: Sequence[int]) -> None:
        """Take a share of blocks that another sequence holds."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.references > 0, f"nobody holds block {block_id}"
            block.references += 1

    def match(self, token_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Take a share of the blocks that hold the longest cached prefix of `token_ids`.

        Gives them with the names of their content. At least one token is left over: its row has to
        be computed to predict the next one.
        """
        found: list[int] = []
        contents: list[int] = []
        parent = ROOT
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            key = PrefixKey(parent, tuple(token_ids[start : start + self.block_size]))
            block_id = self._cached.get(key)
            if block_id is None:
                break
            block = self._blocks[block_id]
            if block.references == 0:
                del self._free[block_id]
            block.references += 1
            parent = block.content
            found.append(block_id)
            contents.append(parent)
        return found, contents

    def register(self, block_id: int, parent: int, token_ids: Sequence[int]) -> int:
        """Make a full, computed block findable and name its content, the parent of the next one.

        If another block holds the same content already, that one stays the findable one.
        """
        assert len(token_ids) == self.block_size
        if not self.prefix_cache:
            return ROOT
        block = self._blocks[block_id]
        assert block.references > 0
        if block.key is not None:
            return block.content
        key = PrefixKey(parent, tuple(token_ids))
        holder = self._cached.setdefault(key, block_id)
        if holder == block_id:
            block.key = key
            block.content = self._next_content
            self._next_content += 1
        return self._blocks[holder].content

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
