"""The block pool's books: every block is free or referenced, whatever happens in whatever order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model.batch import ChunkResult, SamplingParams, StepResult, Token
from server.engine.block_pool import ROOT, BlockPool
from server.engine.request import FinishReason, Request
from server.engine.scheduler import Scheduler


def filled(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Blocks that hold `tokens`, registered."""
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    assert blocks is not None
    content = ROOT
    for index in range(len(tokens) // pool.block_size):
        part = tokens[index * pool.block_size : (index + 1) * pool.block_size]
        content = pool.register(blocks[index], content, part)
    return blocks


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
    again, _ = pool.match([1, 2, 3, 4, 5])
    assert again == blocks
    pool.release(again)
    everything = pool.allocate(4)
    assert everything is not None
    assert pool.match([1, 2, 3, 4, 5])[0] == []


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
    assert pool.match([1, 2, 3, 4, 5])[0] == first
    pool.check([first, first])


def test_the_last_token_is_never_matched() -> None:
    pool = BlockPool(4, 2)
    filled(pool, [1, 2, 3, 4])
    assert len(pool.match([1, 2, 3, 4])[0]) == 1
    assert len(pool.match([1, 2, 3, 4, 5])[0]) == 2


def test_a_child_of_an_evicted_parent_is_out_of_reach() -> None:
    pool = BlockPool(3, 2)
    blocks = filled(pool, [1, 2, 3, 4])
    pool.release(blocks[:1])  # the parent goes, the child is still held
    for _ in range(2):
        taken = pool.allocate(1)
        assert taken is not None
    fresh = taken
    pool.register(fresh[0], ROOT, [1, 2])  # the same tokens, computed anew
    assert pool.match([1, 2, 3, 4, 5])[0] == fresh


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

    The model of it all is a set of open requests, and for each slot of the cache the tokens that its keys and
    values come from; the invariants are asserted after each rule.
    """

    @initialize(
        blocks=st.integers(4, 12),
        budget=st.integers(4, 20),
        running=st.integers(1, 4),
        prefix_cache=st.booleans(),
    )
    def start(self, blocks: int, budget: int, running: int, prefix_cache: bool) -> None:
        self.pool = BlockPool(blocks, 2, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.pool, token_budget=budget, max_running=running)
        self.open: set[str] = set()
        self.count = 0
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.cache: dict[int, tuple[int, ...]] = {}

    @rule(length=st.integers(1, 8), output=st.integers(0, 8), alphabet=st.integers(1, 2), eos=st.booleans())
    def add(self, length: int, output: int, alphabet: int, eos: bool) -> None:
        capacity = self.pool.num_blocks * self.pool.block_size
        length = min(length, capacity - output)
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
        output = min(output, self.pool.num_blocks * self.pool.block_size - len(prompt))
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

    @rule(token=st.sampled_from([0, 1, 9]), fails=st.sampled_from([False, False, False, True]))
    def step(self, token: int, fails: bool) -> None:
        batch = self.scheduler.schedule()
        if batch is None:
            assert not self.open
            return
        assert batch.num_tokens <= self.scheduler.token_budget
        slots: set[int] = set()
        for source, target in batch.copies:
            for offset in range(2):
                self.cache[target * 2 + offset] = self.cache.get(source * 2 + offset, ())
        for chunk in batch.chunks:  # no two rows are written to one slot
            for place in range(chunk.start, chunk.stop):
                slot = chunk.block_table[place // 2] * 2 + place % 2
                assert slot not in slots
                slots.add(slot)
                self.cache[slot] = tuple(chunk.token_ids[: place + 1])
        for chunk in batch.chunks:  # each reads its own past
            for place in range(chunk.start):
                slot = chunk.block_table[place // 2] * 2 + place % 2
                assert self.cache[slot] == tuple(chunk.token_ids[: place + 1])
        if fails:
            names = [chunk.request_id for chunk in batch.chunks]
            outputs = self.scheduler.fail(names, FinishReason.ERROR, "broken")
            assert [name for name, _ in outputs] == names
        else:
            results = tuple(ChunkResult(Token(token) if chunk.samples else None) for chunk in batch.chunks)
            outputs = self.scheduler.update(batch, StepResult(results))
        for name, output in outputs:
            assert name in self.open
            if output.finish_reason is not None:
                self.open.discard(name)

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
        assert self.pool.num_used == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
