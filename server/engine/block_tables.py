"""Which blocks of the cache each sequence holds: reserved, found by prefix, shared with forks, given back.

A sequence has a block table for each cache group, all of one length. In a group with a window the blocks
that no row to come can see are given back while it runs, and leave holes. Writes a sequence's tables and
what was found of its prefix; who runs, and how many rows, is the scheduler's matter.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Sequences

from model.batch import HOLE, Copy
from model.config import most_blocks
from server.engine.block_pool import BlockPool, PrefixKey, root_of
from server.engine.request import Sequence


class BlockTables:
    """The block tables of all sequences over a pool for each cache group; a step has `most_rows` at most."""

    def __init__(self, pools: Sequences[BlockPool], most_rows: int) -> None:
        self.pools = tuple(pools)
        self.block_size = pools[0].block_size
        self._most_rows = most_rows
        assert all(pool.block_size == self.block_size for pool in pools)

    @property
    def num_used(self) -> int:
        """Blocks that at least one sequence holds, of all groups together."""
        return sum(pool.num_used for pool in self.pools)

    @property
    def num_blocks(self) -> int:
        """Blocks of all groups together."""
        return sum(pool.num_blocks for pool in self.pools)

    def fits_alone(self, num_tokens: int) -> bool:
        """Whether a sequence that comes to so many tokens finds room when nobody else holds any."""
        return all(self._most_blocks(pool, num_tokens) <= pool.num_blocks for pool in self.pools)

    def fits(self, num_tokens: int) -> bool:
        """Whether so many tokens find room now that share nothing with others."""
        return all(self._most_blocks(pool, num_tokens) <= pool.num_free for pool in self.pools)

    def start(self, sequence: Sequence) -> bool:
        """Let a sequence hold what there is of its prefix; False and nothing if the rest finds no room.

        It starts only when all its tokens find a place, although it takes its blocks chunk by chunk:
        one that starts too early would be preempted halfway.
        """
        sequence.block_tables = tuple([] for _ in self.pools)
        sequence.given_back = [0] * len(self.pools)
        leader = sequence.leader
        if leader is not None and leader.num_computed >= leader.prompt_length and self._has_prompt(leader):
            self._fork(sequence, leader)
        elif sequence.request.params.prompt_logprobs is None:  # else the row of each token is needed
            self._match(sequence)
        for pool, held in zip(self.pools, _held(sequence), strict=True):
            if self._most_blocks(pool, len(sequence.token_ids)) - len(held) > pool.num_free:
                self.free(sequence)
                return False
        return True

    def reserve(self, sequence: Sequence, count: int) -> bool:
        """Make the block tables cover the next `count` tokens, if the pools have the blocks."""
        missing = self._blocks_for(sequence.num_computed + count) - len(sequence.block_tables[0])
        if missing <= 0:
            return True
        if missing > min(pool.num_free for pool in self.pools):
            return False
        for pool, table in zip(self.pools, sequence.block_tables, strict=True):
            table.extend(pool.allocate(missing) or ())
        return True

    def take_over(self, sequence: Sequence) -> list[Copy]:
        """What to copy into an admitted fork's first own block, if that begins with a part of the prompt."""
        leader, sequence.leader = sequence.leader, None
        last, begun = divmod(sequence.num_computed, self.block_size)
        if leader is None or not sequence.forked or not begun:
            return []
        tables = zip(leader.block_tables, sequence.block_tables, strict=True)
        return [Copy(group, theirs[last], own[last]) for group, (theirs, own) in enumerate(tables)]

    def advance(self, sequence: Sequence) -> None:
        """Rows were computed, up to `num_computed` for good: make full blocks findable, give others back.

        Kept is what the last computed row sees, though the next one may see a position less: a fork computes
        the prompt's last row once more.
        """
        for index, key in self._keys(sequence, sequence.num_computed // self.block_size):
            for pool, table in zip(self.pools, sequence.block_tables, strict=True):
                pool.register(table[index], key)
        for group, pool in enumerate(self.pools):
            first = self._first_seen(pool, sequence.num_computed - 1)
            table, given_back = sequence.block_tables[group], sequence.given_back[group]
            if first > given_back:
                pool.release(table[given_back:first])
                table[given_back:first] = [HOLE] * (first - given_back)
                sequence.given_back[group] = first

    def free(self, sequence: Sequence) -> None:
        """Give everything back that a sequence holds; nothing of it counts as computed any more."""
        for pool, held in zip(self.pools, _held(sequence), strict=False):  # none of one that waits
            pool.release(held)
        sequence.block_tables = ()
        sequence.given_back = []
        sequence.num_computed = 0
        sequence.contents = []
        sequence.forked = False

    def borrow(self) -> tuple[list[int], ...] | None:
        """Tables of one block each, for a trial, to be given back; None if others hold all blocks."""
        if not all(pool.num_free for pool in self.pools):
            return None
        return tuple(pool.allocate(1) or [] for pool in self.pools)

    def give(self, tables: tuple[list[int], ...]) -> None:
        """Take back what was borrowed."""
        for pool, table in zip(self.pools, tables, strict=True):
            pool.release(table)

    def check(self, running: Sequences[Sequence]) -> None:
        """Assert the invariants (AssertionError if one is broken); nobody else holds any block."""
        for sequence in running:
            whole = sequence.num_computed // self.block_size
            assert len({len(table) for table in sequence.block_tables}) == 1
            assert sequence.num_computed <= len(sequence.block_tables[0]) * self.block_size
            for pool, table, held in zip(self.pools, sequence.block_tables, _held(sequence), strict=True):
                given_back = len(table) - len(held)
                assert given_back <= self._first_seen(pool, sequence.num_computed), "a row needs what is gone"
                # Copy on write: what a sequence goes on writing is its own.
                for block_id in table[max(whole, given_back) :]:
                    assert pool.references(block_id) == 1, f"block {block_id} is written and shared"
        for group, pool in enumerate(self.pools):
            pool.check([_held(sequence)[group] for sequence in running])

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _most_blocks(self, pool: BlockPool, num_tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds at most at once."""
        return most_blocks(pool.window, num_tokens, self._most_rows, self.block_size)

    def _first_seen(self, pool: BlockPool, position: int) -> int:
        """Index of the first block that the row at a position sees something of."""
        return 0 if pool.window is None else max(0, position + 1 - pool.window) // self.block_size

    def _keys(self, sequence: Sequence, count: int) -> Iterator[tuple[int, PrefixKey]]:
        """Index and key of the first `count` blocks, but for those whose contents have names; names them."""
        size, names = self.block_size, sequence.contents
        for index in range(len(names), count):
            parent = names[-1] if names else root_of(sequence.request.adapter)
            key = PrefixKey(parent, tuple(sequence.token_ids[index * size : (index + 1) * size]))
            names.append(key.content)
            yield index, key

    def _match(self, sequence: Sequence) -> None:
        """Hold the longest prefix of which the pools have what the row after it sees.

        At least one token is left over: its row has to be computed to predict the next one.
        """
        found: list[list[int | None]] = [[] for _ in self.pools]
        runs = [0] * len(self.pools)  # blocks in a row that were found last
        count = 0
        for index, key in self._keys(sequence, (len(sequence.token_ids) - 1) // self.block_size):
            for group, pool in enumerate(self.pools):
                block = pool.find(key)
                found[group].append(block)
                runs[group] = 0 if block is None else runs[group] + 1
            after = index + 1
            firsts = [self._first_seen(pool, after * self.block_size) for pool in self.pools]
            if all(run >= after - first for run, first in zip(runs, firsts, strict=True)):
                count = after
            elif any(not run for run, pool in zip(runs, self.pools, strict=True) if pool.window is None):
                break
        del sequence.contents[count:]
        sequence.num_computed = count * self.block_size
        self._hold(sequence, count, found)
        sequence.cached_tokens = min(sequence.num_computed, sequence.prompt_length)

    def _has_prompt(self, leader: Sequence) -> bool:
        """Whether it still holds all that the row of its prompt's last token sees."""
        last = leader.prompt_length - 1
        given_back = zip(self.pools, leader.given_back, strict=True)
        return all(count <= self._first_seen(pool, last) for pool, count in given_back)

    def _fork(self, sequence: Sequence, leader: Sequence) -> None:
        """Share the full blocks before the prompt's last token, whose row the fork computes itself."""
        count = (sequence.prompt_length - 1) // self.block_size
        sequence.contents = leader.contents[:count]
        sequence.num_computed = sequence.prompt_length - 1
        self._hold(sequence, count, leader.block_tables)
        sequence.cached_tokens = 0
        sequence.forked = True

    def _hold(self, sequence: Sequence, count: int, tables: Sequences[Sequences[int | None]]) -> None:
        """Share those of the first `count` blocks of these tables that the next row sees."""
        for group, (pool, table) in enumerate(zip(self.pools, tables, strict=True)):
            first = self._first_seen(pool, sequence.num_computed)
            shared = [block for block in table[first:count] if block is not None]
            assert len(shared) == count - first
            pool.share(shared)
            sequence.block_tables[group].extend([HOLE] * first + shared)
            sequence.given_back[group] = first


def _held(sequence: Sequence) -> list[list[int]]:
    """The blocks of each table that were not given back."""
    return [
        table[given_back:]
        for table, given_back in zip(sequence.block_tables, sequence.given_back, strict=True)
    ]
