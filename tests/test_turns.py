"""What many connections say at once is read by turns, in order; who is alone never waits."""

import asyncio
from functools import partial

from server.edge.turns import PER_TURN, Turns


def test_a_crowd_is_taken_by_turns_and_in_order() -> None:
    async def work() -> None:
        turns, read, count = Turns(), [], 3 * PER_TURN + 1
        for number in range(count):
            if turns.take():
                read.append(number)
            else:
                turns.wait(partial(read.append, number))
        sizes = []
        while len(read) < count:
            sizes.append(len(read))
            await asyncio.sleep(0)
        assert sizes == [PER_TURN, 2 * PER_TURN, 3 * PER_TURN]
        assert read == [*range(count)]

    asyncio.run(work())


def test_who_is_alone_never_waits() -> None:
    async def work() -> None:
        turns = Turns()
        for _ in range(3 * PER_TURN):
            assert turns.take()
            await asyncio.sleep(0)

    asyncio.run(work())


def test_nobody_goes_before_those_that_wait() -> None:
    async def work() -> None:
        turns, read = Turns(), []
        taken = [turns.take() for _ in range(PER_TURN + 1)]
        assert taken == [True] * PER_TURN + [False]
        for number in range(PER_TURN + 1):
            turns.wait(partial(read.append, number))
        await asyncio.sleep(0)
        assert read == [*range(PER_TURN)]
        assert not turns.take(), "one still waits"
        await asyncio.sleep(0)
        assert read == [*range(PER_TURN + 1)]

    asyncio.run(work())
