"""The engine thread: one terminal output a request whatever happens, and every block comes back."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from harness import Tiny

from model.batch import Batch, SamplingParams, StepResult
from model.loader import make_runner
from model.runner import Runner
from server.engine.block_pool import BlockPool
from server.engine.engine import STEP_FAILED, Engine, Overloaded, Stopped, Submission
from server.engine.request import FinishReason, Request, TokenOutput
from server.engine.scheduler import Scheduler


class FaultyRunner:
    """The real runner, which raises in chosen steps, and takes its time if told to."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.fail_when: Callable[[Batch], bool] = lambda batch: False
        self.seconds = 0.0
        self.steps = 0

    def execute(self, batch: Batch) -> StepResult:
        self.steps += 1
        time.sleep(self.seconds)
        if self.fail_when(batch):
            raise MemoryError("out of memory at 0xdeadbeef")
        return self.runner.execute(batch)


def make_engine(tiny: Tiny, *, blocks: int = 64, max_running: int = 4, max_waiting: int = 100) -> Engine:
    runner = make_runner(tiny.model, blocks, 32, max_running)
    pool = BlockPool(blocks, runner.graph.cache.block_size)
    scheduler = Scheduler(pool, token_budget=32, max_running=max_running)
    return Engine(scheduler, FaultyRunner(runner), max_waiting=max_waiting)


def request(name: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 8) -> Request:
    return Request(name, prompt, SamplingParams(), max_tokens)


async def collect(submission: Submission) -> list[tuple[int, TokenOutput]]:
    return [pair async for pair in submission]


async def until_idle(engine: Engine) -> None:
    deadline = time.monotonic() + 5
    while engine.stats.running or engine.stats.waiting or engine.stats.blocks_used or engine.num_requests:
        assert time.monotonic() < deadline, engine.stats
        await asyncio.sleep(0.005)


def run(engine: Engine, work: Callable[[], Awaitable[None]]) -> None:
    async def inside() -> None:
        engine.start()
        try:
            await work()
        finally:
            await engine.stop()

    asyncio.run(inside())
    assert engine._thread is not None and not engine._thread.is_alive()


def test_each_request_gets_its_tokens_and_one_terminal_output(tiny: Tiny) -> None:
    engine = make_engine(tiny)

    async def work() -> None:
        prompts = [tuple(range(1, 4 + 11 * i)) for i in range(6)]
        submission = engine.submit([request(f"{i}", prompt, 5 + i) for i, prompt in enumerate(prompts)])
        outputs = await collect(submission)
        for index, prompt in enumerate(prompts):
            mine = [output for place, output in outputs if place == index]
            assert [output.finish_reason is not None for output in mine] == [False] * (4 + index) + [True]
            drive = tiny.drive()
            trace = drive.add("alone", prompt, max_tokens=5 + index)
            drive.run()
            assert [output.token.id for output in mine if output.token] == trace.tokens
        await until_idle(engine)

    run(engine, work)


def test_a_failing_step_ends_its_requests_and_no_others(tiny: Tiny) -> None:
    engine = make_engine(tiny, max_running=1)
    runner: FaultyRunner = engine._runner  # type: ignore[assignment]

    async def work() -> None:
        runner.fail_when = lambda batch: batch.chunks[0].request_id == "a" and runner.steps == 4
        a, b = engine.submit([request("a")]), engine.submit([request("b")])
        outputs_a, outputs_b = await asyncio.gather(collect(a), collect(b))
        assert [output.finish_reason for _, output in outputs_a] == [None, None, None, FinishReason.ERROR]
        assert outputs_a[-1][1].error == STEP_FAILED
        assert outputs_b[-1][1].finish_reason is FinishReason.LENGTH
        runner.fail_when = lambda batch: False
        again = await collect(engine.submit([request("a again")]))
        assert [o.token.id for _, o in again if o.token] == [o.token.id for _, o in outputs_b if o.token]
        await until_idle(engine)

    run(engine, work)


def test_a_fault_of_the_engine_itself_is_told_to_everyone(tiny: Tiny) -> None:
    engine = make_engine(tiny)

    async def work() -> None:
        submission = engine.submit([request("a", max_tokens=400), request("b", max_tokens=400)])
        outputs = aiter(submission)
        await anext(outputs)
        engine._scheduler.update = lambda batch, step: 1 / 0  # type: ignore[assignment, return-value]
        rest = [output async for _, output in outputs]
        assert sum(output.finish_reason is FinishReason.ERROR for output in rest) == 2
        assert not engine.alive
        with pytest.raises(Stopped):
            engine.submit([request("c")])

    run(engine, work)


@pytest.mark.parametrize("tokens_before", [0, 1, 5])
def test_closing_frees_the_blocks_within_a_step(tiny: Tiny, tokens_before: int) -> None:
    engine = make_engine(tiny, max_running=1)

    async def work() -> None:
        running = engine.submit([request("running", max_tokens=400)])
        queued = engine.submit([request("queued", max_tokens=400)])
        outputs = aiter(running)
        for _ in range(tokens_before):
            await anext(outputs)
        queued.close()
        running.close()
        running.close()
        assert [pair async for pair in outputs] == []
        await until_idle(engine)

    run(engine, work)


def test_cancelling_one_of_several(tiny: Tiny) -> None:
    engine = make_engine(tiny)

    async def work() -> None:
        submission = engine.submit([request("a", max_tokens=300), request("b", max_tokens=20)])
        seen = []
        async for index, _ in submission:
            seen.append(index)
            if len(seen) == 5:
                submission.cancel(0)
        assert seen.count(1) == 20
        assert 0 not in seen[5:]
        await until_idle(engine)

    run(engine, work)


def test_admission_is_bounded_and_all_or_nothing(tiny: Tiny) -> None:
    engine = make_engine(tiny, max_running=2, max_waiting=2)

    async def work() -> None:
        first = engine.submit([request(f"{i}", max_tokens=300) for i in range(3)])
        with pytest.raises(Overloaded):
            engine.submit([request("x"), request("y")])
        last = engine.submit([request("z")])
        with pytest.raises(Overloaded):
            engine.submit([request("w")])
        first.close()
        await collect(last)
        await collect(engine.submit([request(f"again{i}") for i in range(4)]))
        await until_idle(engine)

    run(engine, work)


def test_stopping_tells_those_who_wait(tiny: Tiny) -> None:
    engine = make_engine(tiny, max_running=1)

    async def inside() -> list[list[tuple[int, TokenOutput]]]:
        engine.start()
        a, b = engine.submit([request("a", max_tokens=450)]), engine.submit([request("b", max_tokens=450)])
        tasks = [asyncio.create_task(collect(submission)) for submission in (a, b)]
        await asyncio.sleep(0.05)
        await engine.stop()
        return await asyncio.gather(*tasks)

    for outputs in asyncio.run(inside()):
        assert [o.finish_reason for _, o in outputs if o.finish_reason] == [FinishReason.ERROR]


def test_an_idle_engine_uses_no_processor_time(tiny: Tiny) -> None:
    engine = make_engine(tiny)

    async def work() -> None:
        await collect(engine.submit([request("a")]))
        before = time.process_time()
        await asyncio.sleep(1.0)
        assert time.process_time() - before < 0.2

    run(engine, work)


def test_a_request_that_could_never_fit_is_our_bug(tiny: Tiny) -> None:
    scheduler = Scheduler(BlockPool(2, 16), token_budget=8, max_running=1)
    with pytest.raises(AssertionError):
        scheduler.add(request("a", tuple(range(30)), 10))
