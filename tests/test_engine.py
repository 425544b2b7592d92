"""The engine thread: one terminal output a request whatever happens, and every block comes back."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from harness import Tiny

from model.batch import Batch, SamplingParams, StepResult
from model.loader import make_runner
from model.ops.sampling import Scores
from model.runner import MASK_FAILED, NOTHING_ALLOWED, Runner
from server.engine.admission import Admission, Overloaded
from server.engine.block_pool import BlockPool
from server.engine.engine import STEP_FAILED, Engine
from server.engine.request import FinishReason, Request, TokenOutput
from server.engine.scheduler import ADVANCE_FAILED, Scheduler
from server.engine.speculator import Speculator
from server.engine.submission import Submission


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


def make_engine(
    tiny: Tiny, *, blocks: int = 64, max_running: int = 4, max_waiting: int = 100, **more: Any
) -> Engine:
    """An engine over the tiny model; `more` goes to it."""
    runner = make_runner(tiny.model, (blocks,), 32, max_running)
    pool = BlockPool(blocks, runner.graph.cache.block_size)
    scheduler = Scheduler(pool, token_budget=32, max_running=max_running)
    return Engine(scheduler, FaultyRunner(runner), Admission(max_running, max_waiting, 100_000), **more)


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


def test_a_token_is_told_while_the_next_is_computed(tiny: Tiny) -> None:
    """Neither before that step is on its way nor after it; the last one, which has no next, at once."""
    engine = make_engine(tiny)
    runner: FaultyRunner = engine._runner  # type: ignore[assignment]
    go_on = threading.Event()
    runner.fail_when = lambda batch: runner.steps > 1 and not go_on.wait(5)

    async def work() -> None:
        outputs = aiter(engine.submit([request("a", max_tokens=3)]))
        first = await asyncio.wait_for(anext(outputs), 2)
        assert first[1].token is not None
        while runner.steps < 2:  # which waits until it may go on
            await asyncio.sleep(0.001)
        go_on.set()
        assert [o.finish_reason async for _, o in outputs] == [None, FinishReason.LENGTH]
        assert runner.steps == 3

    run(engine, work)


class Patient:
    """Takes its time to find that it has no guess, until a token was told."""

    name, computes = "draft-model", True

    def __init__(self) -> None:
        self.told = threading.Event()
        self.was_told: list[bool] = []

    def chances(self, sequences: Sequence[object]) -> list[list[float]]:
        if sequences:
            self.was_told.append(self.told.wait(2))
        return [[] for _ in sequences]

    def guess(self, counts: object) -> dict[Any, tuple[int, ...]]:
        raise AssertionError


def test_a_token_does_not_wait_for_a_model_that_guesses(tiny: Tiny) -> None:
    proposer = Patient()
    engine = make_engine(tiny, speculator=Speculator(proposer))

    async def work() -> None:
        async for _ in engine.submit([request("a", max_tokens=3)]):
            proposer.told.set()
        assert proposer.was_told == [True, True]

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
        assert [o.finish_reason for _, o in outputs if o.finish_reason] == [FinishReason.STOPPED]


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


# -- constraints, and what ends an output ---------------------------------------------------------------


class Script:
    """A constraint that lets a given set of tokens come at each place, and is over after the last."""

    def __init__(self, *allowed: Sequence[int], endless: bool = False) -> None:
        self.allowed = allowed
        self.endless = endless
        self.taken: list[int] = []
        self.mask_threads: set[str] = set()

    def mask(self) -> bytes:
        self.mask_threads.add(threading.current_thread().name)
        words = np.zeros(9, np.uint32)  # 288 bits for 260 tokens
        for token in self.allowed[len(self.taken) % len(self.allowed)]:
            words[token // 32] |= np.uint32(1 << token % 32)
        return words.tobytes()

    def advance(self, token_id: int) -> bool:
        self.taken.append(token_id)
        return not self.endless and len(self.taken) == len(self.allowed)


class FaultyScript(Script):
    """Raises at the third token."""

    def __init__(self, method: str) -> None:
        super().__init__(range(5), endless=True)
        self.method = method

    def mask(self) -> bytes:
        if self.method == "mask" and len(self.taken) == 2:
            raise ValueError("too complex: secret 0xdeadbeef")
        return super().mask()

    def advance(self, token_id: int) -> bool:
        if self.method == "advance" and len(self.taken) == 2:
            raise ValueError("too complex: secret 0xdeadbeef")
        return super().advance(token_id)


class Overlapping(Script):
    """Its mask is ready only when all whom the meeting waits for are there."""

    def __init__(self, meeting: threading.Barrier) -> None:
        super().__init__(range(260), endless=True)
        self.meeting = meeting

    def mask(self) -> bytes:
        self.meeting.wait()
        return super().mask()


def tokens_of(outputs: list[tuple[int, TokenOutput]], index: int = 0) -> list[int]:
    return [output.token.id for place, output in outputs if place == index and output.token]


def reason_of(outputs: list[tuple[int, TokenOutput]], index: int = 0) -> FinishReason | None:
    return [output for place, output in outputs if place == index][-1].finish_reason


def test_a_constraint_decides_what_comes_and_when_it_ends(any_tiny: Tiny) -> None:
    engine = make_engine(any_tiny)

    async def work() -> None:
        script = Script([65], range(70, 80), [259], [0, 258])
        free = request("free")
        held = replace(request("held"), constraint=script)
        outputs = await collect(engine.submit([held, free]))
        tokens = tokens_of(outputs)
        assert tokens == script.taken
        assert [token in allowed for token, allowed in zip(tokens, script.allowed, strict=True)] == [True] * 4
        assert reason_of(outputs) is FinishReason.EOS
        assert all(name.startswith("rivulet-mask") for name in script.mask_threads)
        alone = await collect(engine.submit([request("alone")]))
        assert tokens_of(outputs, 1) == tokens_of(alone)
        await until_idle(engine)

    run(engine, work)


@pytest.mark.parametrize(
    ("constraint", "error"),
    [
        (FaultyScript("mask"), MASK_FAILED),
        (FaultyScript("advance"), ADVANCE_FAILED),
        (Script([1], [2], [], [3]), NOTHING_ALLOWED),
        (Script([1], [2], [270], [3]), NOTHING_ALLOWED),  # beyond the vocabulary
    ],
    ids=["mask raises", "advance raises", "nothing allowed", "beyond"],
)
def test_a_constraint_that_fails_ends_its_own_request(any_tiny: Tiny, constraint: Script, error: str) -> None:
    engine = make_engine(any_tiny)
    constraint.taken.clear()

    async def work() -> None:
        broken = replace(request("broken"), constraint=constraint)
        outputs = await collect(engine.submit([broken, request("b")]))
        mine = [output for place, output in outputs if place == 0]
        assert len([output for output in mine if output.token]) == 2
        assert (mine[-1].finish_reason, mine[-1].error, mine[-1].token) == (FinishReason.ERROR, error, None)
        assert tokens_of(outputs, 1) == tokens_of(await collect(engine.submit([request("alone")])))
        assert reason_of(outputs, 1) is FinishReason.LENGTH
        await until_idle(engine)

    run(engine, work)


def test_masks_are_made_while_the_model_computes(tiny: Tiny) -> None:
    """Two masks and the model meet in each step, which they could not do one after the other."""
    engine = make_engine(tiny)
    runner: Runner = engine._runner.runner  # type: ignore[attr-defined]
    meeting, compute = threading.Barrier(3, timeout=10), runner.graph.run

    def run_graph(batch: Batch, rows: Sequence[int], *, keeps: bool) -> Scores:
        meeting.wait()
        return compute(batch, rows, keeps=keeps)

    runner.graph.run = run_graph  # type: ignore[method-assign]

    async def work() -> None:
        requests = [replace(request(f"{i}"), constraint=Overlapping(meeting)) for i in range(2)]
        outputs = await collect(engine.submit(requests))
        assert [len(tokens_of(outputs, index)) for index in range(2)] == [8, 8]

    run(engine, work)


@pytest.mark.parametrize(
    ("ends", "reason", "count"),
    [
        ({"stop_ids": {0: True}}, FinishReason.STOP_TOKEN, 1),
        ({"stop_ids": {3: True}}, FinishReason.STOP_TOKEN, 4),
        ({"eos_ids": {3: True}}, FinishReason.EOS, 4),
        ({"eos_ids": {3: True}, "stop_ids": {3: True}}, FinishReason.EOS, 4),
        ({"eos_ids": {5: True}, "stop_ids": {3: True}}, FinishReason.STOP_TOKEN, 4),
        ({"stop_ids": {7: True}}, FinishReason.STOP_TOKEN, 8),  # and the length is reached
        ({"eos_ids": {7: True}}, FinishReason.EOS, 8),
        ({}, FinishReason.LENGTH, 8),
    ],
)
def test_what_ends_an_output(
    tiny: Tiny, ends: dict[str, dict[int, bool]], reason: FinishReason, count: int
) -> None:
    """Places in the script of eight tokens whose token is an end of a kind."""
    engine = make_engine(tiny)
    script = list(range(100, 108))
    named = {name: frozenset(script[place] for place in places) for name, places in ends.items()}

    async def work() -> None:
        constraint = Script(*([token] for token in script), endless=True)
        outputs = await collect(engine.submit([replace(request("a"), constraint=constraint, **named)]))
        assert tokens_of(outputs) == script[:count]
        assert reason_of(outputs) is reason
        await until_idle(engine)

    run(engine, work)


@pytest.mark.parametrize(("tokens", "reason"), [(3, FinishReason.EOS), (4, FinishReason.LENGTH)])
def test_length_cuts_a_structure(tiny: Tiny, tokens: int, reason: FinishReason) -> None:
    """One that is complete with the last token has ended by itself."""
    engine = make_engine(tiny)

    async def work() -> None:
        constraint = Script(*([1] for _ in range(tokens)))
        held = replace(request("a", max_tokens=3), constraint=constraint)
        outputs = await collect(engine.submit([held]))
        assert tokens_of(outputs) == [1, 1, 1]
        assert reason_of(outputs) is reason

    run(engine, work)


def test_a_minimum_of_tokens_puts_the_end_off(tiny: Tiny) -> None:
    engine = make_engine(tiny)

    async def work() -> None:
        free = tokens_of(await collect(engine.submit([request("free", max_tokens=1)])))
        for minimum in (0, 1, 5):
            params = SamplingParams(
                min_tokens=minimum, ending_ids=frozenset(free), logit_bias=((free[0], 99.0),)
            )
            held = replace(request("a"), params=params, eos_ids=frozenset(free))
            outputs = await collect(engine.submit([held]))
            tokens = tokens_of(outputs)
            assert free[0] not in tokens[:minimum]
            assert tokens[minimum:] == free
            assert reason_of(outputs) is FinishReason.EOS
        # A structure that has come to its end goes before the minimum.
        params = SamplingParams(min_tokens=5, ending_ids=frozenset({9}))
        held = replace(request("b"), params=params, constraint=Script([8], [9], endless=True))
        held = replace(held, eos_ids=frozenset({9}))
        outputs = await collect(engine.submit([held]))
        assert tokens_of(outputs) == [8, 9]
        assert reason_of(outputs) is FinishReason.EOS

    run(engine, work)


def test_forks_through_the_engine(any_tiny: Tiny) -> None:
    """One that fails or is given up leaves the others alone; a failing step ends its own only."""
    engine = make_engine(any_tiny, max_running=3)
    runner: FaultyRunner = engine._runner  # type: ignore[assignment]

    def choices(name: str) -> list[Request]:
        leader = Request(f"{name}0", tuple(range(20)), SamplingParams(temperature=1.0, seed=1), 6)
        forks = (replace(leader, id=f"{name}{i}", fork_of=leader.id) for i in range(1, 5))
        return [leader, *forks]

    async def work() -> None:
        want = tokens_of(await collect(engine.submit(choices("a")[:1])))
        outputs = await collect(engine.submit(choices("b")))
        assert [tokens_of(outputs, index) for index in range(5)] == [want] * 5
        submission = engine.submit(choices("c"))
        submission.cancel(0)
        submission.cancel(3)
        outputs = await collect(submission)
        assert [tokens_of(outputs, index) for index in range(5)] == [[], want, want, [], want]
        runner.fail_when = lambda batch: any(chunk.request_id == "d0" for chunk in batch.chunks)
        outputs = await collect(engine.submit(choices("d")))
        reasons = [reason_of(outputs, index) for index in range(5)]
        assert reasons == [FinishReason.ERROR, *[FinishReason.LENGTH] * 4]
        await until_idle(engine)

    run(engine, work)
