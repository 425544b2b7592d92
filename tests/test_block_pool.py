"""The block pool's books: every block is free or referenced, whatever happens in whatever order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.batch import Chunk, ChunkResult, SamplingParams, StepResult, Token
from server.engine.block_pool import BlockPool, PrefixKey, root_of
from server.engine.request import FinishReason, Request
from server.engine.scheduler import Scheduler


def keys(tokens: list[int], size: int) -> list[PrefixKey]:
    """Of the full blocks of a sequence."""
    found: list[PrefixKey] = []
    for start in range(0, len(tokens) - size + 1, size):
        parent = found[-1].content if found else root_of(0)
        found.append(PrefixKey(parent, tuple(tokens[start : start + size])))
    return found


def filled(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks that hold `tokens`, registered."""
    blocks = pool.allocate(-(-len(tokens) // pool.block_size))
    assert blocks is not None
    for block, key in zip(blocks, keys(tokens, pool.block_size), strict=False):
        pool.register(block, key)
    return blocks


def found(pool: BlockPool, tokens: list[int]) -> list[int | None]:
    return [pool.find(key) for key in keys(tokens, pool.block_size)]


def test_all_or_nothing() -> None:
    pool = BlockPool(4, 2)
    assert pool.allocate(5) is None
    assert pool.num_free == 4
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    assert pool.allocate(0) == []


def test_content_survives_until_the_block_is_given_out_again() -> None:
    pool = BlockPool(4, 2)
    blocks = filled(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert found(pool, [1, 2, 3, 4]) == blocks
    pool.share(blocks)
    assert pool.num_free == 2
    pool.release(blocks)
    everything = pool.allocate(4)
    assert everything is not None
    assert found(pool, [1, 2, 3, 4]) == [None, None]


def test_the_unused_and_the_ends_go_first() -> None:
    pool = BlockPool(5, 2)
    blocks = filled(pool, [1, 2, 3, 4])  # 0, 1
    other = pool.allocate(1)
    assert other is not None
    pool.release(blocks)
    pool.release(other)
    order = [pool.allocate(1) for _ in range(5)]
    assert order == [other, [3], [4], [blocks[1]], [blocks[0]]]


def test_the_same_content_twice_is_kept_once() -> None:
    pool = BlockPool(6, 2)
    first, second = filled(pool, [1, 2, 3, 4]), filled(pool, [1, 2, 3, 4])
    pool.release(second)
    assert found(pool, [1, 2, 3, 4]) == first
    pool.check([first])


def test_a_block_is_found_without_those_before_it() -> None:
    """As behind a window; what came before must be the same all the same."""
    pool = BlockPool(3, 2)
    blocks = filled(pool, [1, 2, 3, 4])
    pool.release(blocks[:1])
    for _ in range(2):
        pool.allocate(1)
    assert found(pool, [1, 2, 3, 4]) == [None, blocks[1]]
    assert found(pool, [2, 1, 3, 4]) == [None, None]
    assert found(pool, [3, 4]) == [None]


def test_what_holds_nothing_cannot_be_shared() -> None:
    with pytest.raises(AssertionError, match="holds nothing"):
        BlockPool(2, 2).share([0])


def test_a_block_is_not_freed_twice() -> None:
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="free already"):
        pool.release(blocks)


def test_check_sees_a_lost_block() -> None:
    pool = BlockPool(2, 2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="reference count"):
        pool.check([])


class SchedulerMachine(RuleBasedStateMachine):
    """Requests and forks come, run, are aborted and fail in any order over a pool that is too small for all.

    The model of it all is a set of open requests, and for each slot of each cache group the tokens that its
    keys and values come from; the invariants are asserted after each rule.
    """

    @initialize(
        windows=st.sampled_from([(None,), (None,), (3,), (1,), (None, 4), (None, 6, 3), (9, 2)]),
        blocks=st.integers(4, 12),
        budget=st.integers(4, 20),
        running=st.integers(1, 4),
        prefix_cache=st.booleans(),
    )
    def start(
        self, windows: tuple[int | None, ...], blocks: int, budget: int, running: int, prefix_cache: bool
    ) -> None:
        self.windows = windows
        pools = [BlockPool(blocks, 2, window=window, prefix_cache=prefix_cache) for window in windows]
        self.scheduler = Scheduler(*pools, token_budget=budget, max_running=running)
        fits = self.scheduler.tables.fits_alone
        self.capacity = next(count for count in range(64, 0, -1) if fits(count))
        self.open: set[str] = set()
        self.count = 0
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}

    @rule(length=st.integers(1, 30), output=st.integers(0, 8), alphabet=st.integers(1, 2), eos=st.booleans())
    def add(self, length: int, output: int, alphabet: int, eos: bool) -> None:
        length = min(length, self.capacity - output)
        if length < 1:
            return
        prompt = tuple(index % alphabet for index in range(length))
        name = f"{self.count}"
        self.count += 1
        self.scheduler.add(Request(name, prompt, SamplingParams(), output, frozenset({9} if eos else ())))
        self.open.add(name)
        self.prompts[name] = prompt

    @precondition(lambda self: self.open)
    @rule(data=st.data(), output=st.integers(0, 8), count=st.integers(1, 3))
    def fork(self, data: st.DataObject, output: int, count: int) -> None:
        leader = data.draw(st.sampled_from(sorted(self.open)))
        prompt = self.prompts[leader]
        output = min(output, self.capacity - len(prompt))
        for _ in range(count):
            name = f"{self.count}"
            self.count += 1
            self.scheduler.add(Request(name, prompt, SamplingParams(), output, fork_of=leader))
            self.open.add(name)
            self.prompts[name] = prompt

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.open)))
        self.scheduler.abort(name)
        self.scheduler.abort(name)
        self.open.discard(name)

    @rule(
        token=st.sampled_from([0, 1, 9]),
        fails=st.sampled_from([False, False, False, True]),
        guess=st.sampled_from([0, 1, 9]),
        guesses=st.integers(0, 3),
        right=st.integers(0, 3),
    )
    def step(self, token: int, fails: bool, guess: int = 0, guesses: int = 0, right: int = 0) -> None:
        guessed = {one: (guess,) * min(guesses, one.most_guesses) for one in self.scheduler.decoding}
        batch = self.scheduler.schedule(guesses=guessed)
        if batch is None:
            assert not self.open
            return
        assert batch.num_tokens <= self.scheduler.token_budget
        for group, source, target in batch.copies:
            for offset in range(2):
                self.cache[group, target * 2 + offset] = self.cache.get((group, source * 2 + offset), ())
        written = [slot for chunk in batch.chunks for slot in self.slots(chunk, chunk.start)]
        assert len(set(written)) == len(written), "two rows are written to one slot"
        for chunk in batch.chunks:
            for slot, place in self.slots(chunk, chunk.start).items():
                self.cache[slot] = tuple(chunk.token_ids[: place + 1])
        for chunk in batch.chunks:  # each reads its own past
            for slot, place in self.slots(chunk, 0).items():
                assert self.cache[slot] == tuple(chunk.token_ids[: place + 1])
        if fails:
            names = [chunk.request_id for chunk in batch.chunks]
            outputs = self.scheduler.fail(names, FinishReason.ERROR, "broken")
            assert [name for name, _ in outputs] == names
        else:
            results = tuple(
                ChunkResult((Token(guess),) * min(right, chunk.guesses) + (Token(token),) * chunk.samples)
                for chunk in batch.chunks
            )
            outputs = self.scheduler.update(batch, StepResult(results))
        for name, output in outputs:
            assert name in self.open
            if output.finish_reason is not None:
                self.open.discard(name)

    def slots(self, chunk: Chunk, first: int) -> dict[tuple[int, int], int]:
        """Group and slot of each place of a sequence that a row sees, up to the chunk's end."""
        found = {}
        for group, (table, window) in enumerate(zip(chunk.block_tables, self.windows, strict=True)):
            seen = 0 if window is None else max(0, chunk.start + 1 - window)
            for place in range(max(first, seen), chunk.stop):
                found[group, table[place // 2] * 2 + place % 2] = place
        return found

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert self.scheduler.num_waiting + self.scheduler.num_running == len(self.open)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if not self.open:
                break
            self.step(token=0, fails=False)
        assert not self.open, "a request never ends"
        self.scheduler.check()
        assert self.scheduler.tables.num_used == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
