"""A fault fails those who must fail, tells them so, and leaves the others and what comes next untouched."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from harness import Tiny
from test_engine import Script, collect, make_engine, reason_of, request, run, tokens_of, until_idle

from model.batch import Batch, Chunk, ChunkResult, Copy, SamplingParams, StepResult
from model.errors import OutOfMemory
from model.ops.sampling import Scores
from model.runner import Runner
from server.engine.attempt import attempt
from server.engine.engine import (
    BARREN_STEPS,
    MEMORY_SHORT,
    SHUTTING_DOWN,
    STEP_FAILED,
    Engine,
    Fault,
    StepRunner,
    Stopped,
)
from server.engine.request import FinishReason, Request

Break = Callable[[Batch], None]


def nothing(batch: Batch) -> None:
    """What a whole runner does more than to compute."""


class Seam:
    """Stands between engine and runner, and breaks a step before or after it was computed."""

    def __init__(self, runner: StepRunner) -> None:
        self.runner = runner
        self.before: Break = nothing
        self.after: Break = nothing
        self.batches: list[Batch] = []

    @classmethod
    def of(cls, engine: Engine) -> "Seam":
        """Put one into an engine."""
        engine._runner = seam = cls(engine._runner)
        return seam

    def execute(self, batch: Batch) -> StepResult:
        self.batches.append(batch)
        self.before(batch)
        result = self.runner.execute(batch)
        self.after(batch)
        return result


def names(batch: Batch) -> set[str]:
    return {chunk.request_id for chunk in batch.chunks}


def failing(victims: set[str], when: str = "any") -> Break:
    """Raises if the batch has one of the victims, in prefill, from its third token on, or ever."""

    def fail(batch: Batch) -> None:
        for chunk in batch.chunks:
            output = len(chunk.token_ids) - chunk.prompt_length
            right = {"prefill": output == 0, "decode": output >= 2, "any": True}[when]
            if right and chunk.request_id in victims:
                raise RuntimeError("/secret/path: 0xdeadbeef")

    return fail


def mixed_requests() -> list[Request]:
    """Nine of all kinds, long enough to be together: drawn at random, held by a constraint, forked."""
    long = tuple(range(1, 41))
    drawn = SamplingParams(temperature=1.5, seed=7, logprobs=2)
    return [
        request("0", max_tokens=40),
        replace(request("1", tuple(range(50, 90)), 35), params=drawn),
        replace(request("2", max_tokens=30), constraint=Script(range(60, 80), [65, 66], endless=True)),
        replace(request("3", long, 30), params=replace(drawn, seed=1)),
        replace(request("4", long, 30), params=replace(drawn, seed=2), fork_of="3"),
        replace(request("5", long, 30), params=replace(drawn, seed=3), fork_of="3"),
        request("6", tuple(range(9)), 35),
        replace(request("7", (9, 8, 7), 30), params=SamplingParams(repetition_penalty=1.7)),
        request("8", tuple(range(100, 135)), 25),
    ]


@pytest.fixture(scope="module")
def alone(tiny: Tiny) -> dict[str, list[int]]:
    """What each of them gets when nothing is broken."""
    found: dict[str, list[int]] = {}

    async def work() -> None:
        requests = mixed_requests()
        outputs = await collect(engine.submit(requests))
        found.update({one.id: tokens_of(outputs, index) for index, one in enumerate(requests)})

    engine = make_engine(tiny, max_running=9)
    run(engine, work)
    return found


# A step that raises


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("when", ["prefill", "decode"])
@pytest.mark.parametrize("victims", ["0", "8", "3", "4", "25", "01234567", "012345678"])
def test_only_those_at_fault_fail(
    tiny: Tiny, alone: dict[str, list[int]], victims: str, when: str, moment: str
) -> None:
    """The others' tokens are what they are alone, whether the step had computed anything or not."""
    engine = make_engine(tiny, max_running=9)
    seam = Seam.of(engine)

    async def work() -> None:
        setattr(seam, moment, failing(set(victims), when))
        requests = mixed_requests()
        outputs = await collect(engine.submit(requests))
        for index, one in enumerate(requests):
            last = [output for place, output in outputs if place == index][-1]
            if one.id in victims:
                assert (last.finish_reason, last.error) == (FinishReason.ERROR, STEP_FAILED)
                assert tokens_of(outputs, index) == alone[one.id][: 0 if when == "prefill" else 2]
            else:
                assert last.finish_reason is FinishReason.LENGTH
                assert tokens_of(outputs, index) == alone[one.id], one.id
        await until_idle(engine)
        engine._scheduler.check()
        seam.before = seam.after = nothing
        again = await collect(engine.submit(requests[6:]))
        assert [tokens_of(again, place) for place in range(3)] == [alone[name] for name in "678"]
        assert engine.healthy

    run(engine, work)


def test_a_step_that_fails_once_harms_nobody(tiny: Tiny, alone: dict[str, list[int]]) -> None:
    """Above all the one in which forks begin, with copies of their leader's block."""
    for moment in ("before", "after"):
        for breaks in (lambda batch: bool(batch.copies), lambda batch: len(batch.chunks) == 9):
            engine = make_engine(tiny, max_running=9)
            seam = Seam.of(engine)

            def once(batch: Batch, seam: Seam = seam, breaks: Callable[[Batch], bool] = breaks) -> None:
                if breaks(batch) and len(batch.chunks) > 1:
                    seam.before = seam.after = nothing
                    raise RuntimeError("once")

            async def work(engine: Engine = engine, seam: Seam = seam) -> None:
                requests = mixed_requests()
                outputs = await collect(engine.submit(requests))
                assert seam.before is seam.after is nothing, "nothing failed"
                for index, one in enumerate(requests):
                    assert tokens_of(outputs, index) == alone[one.id], one.id
                await until_idle(engine)

            setattr(seam, moment, once)
            run(engine, work)


def chunk_of(place: int) -> Chunk:
    """A decode of a sequence in the blocks 2 i and 2 i + 1."""
    return Chunk(f"{place}", list(range(17)), 16, 1, ((2 * place, 2 * place + 1),), 3, SamplingParams())


def execute_part(batch: Batch, victims: set[str], short: bool, tried: list[Batch], part: Batch) -> StepResult:
    """A model that fails on the victims, and has memory for four at most where it is short of it."""
    tried.append(part)
    blocks = {block for chunk in part.chunks for block in chunk.block_tables[0]}
    assert set(part.copies) == {copy for copy in batch.copies if copy.target in blocks}
    if short and len(part.chunks) > 4:
        raise OutOfMemory("4 at most")
    failing(victims)(part)
    return StepResult(tuple(ChunkResult() for _ in part.chunks))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 33])
def test_the_work_of_finding_out_is_bounded(size: int) -> None:
    """Each sequence has one fate, and copies are made for those who need them, and before they do."""
    chunks = tuple(map(chunk_of, range(size)))
    batch = Batch(chunks, tuple(Copy(0, 100 + place, 2 * place + 1) for place in range(0, size, 3)))
    random = Random(size)
    for number in [0, 1, 1, 1, 2, size // 2, size]:
        for short in (False, True):
            victims = {f"{place}" for place in random.sample(range(size), min(number, size))}
            tried: list[Batch] = []
            execute = partial(execute_part, batch, victims, short, tried)
            outcome = attempt(batch, execute, lambda part: part.chunks[-1].request_id)
            computed = [chunk.request_id for part, _ in outcome.computed for chunk in part.chunks]
            everyone = [f"{place}" for place in range(size)]
            assert sorted(computed + outcome.failed + outcome.shed) == sorted(everyone)
            assert set(outcome.failed) == victims - set(outcome.shed)
            assert outcome.shed == (everyone[:3:-1] if short else [])
            assert outcome.smooth == (not outcome.failed and not outcome.shed)
            assert len(tried) <= max(1, 2 * size - 1)
            if number == 1 and not short:
                assert len(tried) <= 2 * size.bit_length() + 1


def test_half_a_prompt_of_a_failed_step_is_never_reused(tiny: Tiny) -> None:
    """The blocks of a step that raised before it computed hold what others left there."""
    engine = make_engine(tiny)
    seam = Seam.of(engine)
    prompt = tuple(range(1, 65))

    async def work() -> None:
        seam.before = failing({"bad"})
        await collect(engine.submit([request("other", tuple(range(70, 140)))]))
        await until_idle(engine)
        outputs = await collect(engine.submit([request("bad", prompt), request("beside", (4, 5))]))
        assert reason_of(outputs) is FinishReason.ERROR
        good = await collect(engine.submit([request("good", prompt)]))
        drive = tiny.drive()
        trace = drive.add("alone", prompt)
        drive.run()
        assert tokens_of(good) == trace.tokens

    run(engine, work)


class Guarded(Script):
    """A constraint like llguidance's: a second mask while one is being made is an error."""

    def __init__(self) -> None:
        super().__init__(range(60, 80), endless=True)
        self.busy = threading.Lock()

    def mask(self) -> bytes:
        if not self.busy.acquire(blocking=False):
            raise RuntimeError("already borrowed")
        try:
            time.sleep(0.05)
            return super().mask()
        finally:
            self.busy.release()


def test_a_constraint_is_not_in_use_when_its_step_is_tried_again(tiny: Tiny) -> None:
    engine = make_engine(tiny)
    runner = engine._runner.runner  # type: ignore[attr-defined]
    compute = runner.graph.run

    def fail_together(batch: Batch, rows: Sequence[int], *, keeps: bool) -> Scores:
        if len(batch.chunks) > 1:
            raise RuntimeError("too many")
        return compute(batch, rows, keeps=keeps)

    async def work() -> None:
        runner.graph.run = fail_together
        held = [replace(request(f"{i}", max_tokens=3), constraint=Guarded()) for i in range(2)]
        outputs = await collect(engine.submit(held))
        assert [reason_of(outputs, index) for index in range(2)] == [FinishReason.LENGTH] * 2

    run(engine, work)


class Panic(BaseException):
    """Like pyo3's PanicException, which is no Exception."""


class Panicking(Script):
    """Panics at its third token."""

    def __init__(self, method: str) -> None:
        super().__init__(range(60, 80), endless=True)
        self.method = method

    def mask(self) -> bytes:
        if self.method == "mask" and len(self.taken) == 2:
            raise Panic
        return super().mask()

    def advance(self, token_id: int) -> bool:
        if self.method == "advance" and len(self.taken) == 2:
            raise Panic
        return super().advance(token_id)


@pytest.mark.parametrize("method", ["mask", "advance"])
def test_a_panic_of_a_constraint_is_its_requests_own(tiny: Tiny, method: str) -> None:
    engine = make_engine(tiny)

    async def work() -> None:
        held = replace(request("held"), constraint=Panicking(method))
        outputs = await asyncio.wait_for(collect(engine.submit([held, request("free")])), 10)
        assert [reason_of(outputs, index) for index in range(2)] == [FinishReason.ERROR, FinishReason.LENGTH]
        await until_idle(engine)

    run(engine, work)


# No memory


def test_memory_that_is_short_costs_the_newest(tiny: Tiny, alone: dict[str, list[int]]) -> None:
    engine = make_engine(tiny, max_running=9)
    seam = Seam.of(engine)

    def only_five(batch: Batch) -> None:
        if len(batch.chunks) > 5:
            raise OutOfMemory("5 at most")

    async def work() -> None:
        seam.before = only_five
        requests = mixed_requests()
        outputs = await collect(engine.submit(requests))
        ends = [[output for place, output in outputs if place == index][-1] for index in range(9)]
        shed = [one.id for one, end in zip(requests, ends, strict=True) if end.error == MEMORY_SHORT]
        assert shed
        assert shed == [one.id for one in requests][-len(shed) :], "not the newest"
        assert {ends[int(name)].finish_reason for name in shed} == {FinishReason.SHED}
        for index, one in enumerate(requests):
            if one.id not in shed:
                assert tokens_of(outputs, index) == alone[one.id]
        assert engine.healthy
        await until_idle(engine)

    run(engine, work)


REAL_SHORTAGES: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.empty(1 << 60, dtype=torch.uint8),
    "numpy": lambda: np.empty(1 << 60, np.uint8),
    "Python": lambda: bytearray(1 << 62),
    "CUDA": lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")),
    "cuBLAS": lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when")),
}


@pytest.mark.parametrize("allocate", REAL_SHORTAGES.values(), ids=REAL_SHORTAGES)
def test_the_runner_says_that_there_is_no_memory(tiny: Tiny, allocate: Callable[[], object]) -> None:
    drive = tiny.drive()
    runner: Runner = drive.runner
    compute = runner.graph.run

    def short(batch: Batch, rows: Sequence[int], *, keeps: bool) -> None:
        compute(batch, rows, keeps=keeps)
        allocate()

    drive.add("a", (1, 2, 3))
    batch = drive.scheduler.schedule()
    assert batch is not None
    runner.graph.run = short  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory):
        runner.execute(batch)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("DefaultCPU")):

        def fail(batch: Batch, rows: Sequence[int], *, keeps: bool, error: Exception = other) -> Scores:
            raise error

        runner.graph.run = fail  # type: ignore[method-assign]
        with pytest.raises(type(other)):
            runner.execute(batch)
    runner.graph.run = compute  # type: ignore[method-assign]
    assert runner.execute(batch).results[0].next_tokens


# The engine itself


class Faults:
    """What an engine says of its end."""

    def __init__(self) -> None:
        self.seen: list[tuple[Fault, str]] = []
        self.thread = ""

    def __call__(self, fault: Fault, reason: str) -> None:
        self.seen.append((fault, reason))
        self.thread = threading.current_thread().name


def check_ended(engine: Engine, faults: Faults, fault: Fault) -> None:
    """Nothing more is taken, and the reason is told."""
    deadline = time.monotonic() + 5
    while not faults.seen:  # those who wait are told first
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert faults.seen == [(fault, fault.value)]
    assert faults.thread != threading.current_thread().name
    assert (engine.alive, engine.healthy, engine.fault) == (False, False, fault)
    with pytest.raises(Stopped, match=fault.value):
        engine.submit([request("late")])


def test_a_stuck_step_is_told_to_everyone_at_once(tiny: Tiny) -> None:
    """Though the native call does not return; nor does stopping wait for it."""
    faults, stuck, entered = Faults(), threading.Event(), threading.Event()
    engine = make_engine(tiny, max_running=1, step_timeout=0.5, on_fault=faults)
    seam = Seam.of(engine)

    def hang(batch: Batch) -> None:
        if len(batch.chunks[0].token_ids) == 6:
            entered.set()
            stuck.wait(30)

    async def inside() -> None:
        engine.start()
        seam.before = hang
        calls = [engine.submit([request("runs")]), engine.submit([request("waits"), request("too")])]
        tasks = [asyncio.create_task(collect(call)) for call in calls]
        await asyncio.to_thread(entered.wait, 10)
        began = time.monotonic()
        runs, waits = await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert time.monotonic() - began > 0.4
        assert [output.finish_reason for _, output in runs] == [None] * 3 + [FinishReason.STOPPED]
        assert [output.error for _, output in waits] == [Fault.STUCK.value] * 2
        assert engine.num_requests == 0
        await asyncio.to_thread(check_ended, engine, faults, Fault.STUCK)
        began = time.monotonic()
        await asyncio.wait_for(engine.stop(), 10)
        assert time.monotonic() - began < 1
        assert engine._thread is not None and engine._thread.is_alive()
        stuck.set()
        await asyncio.to_thread(engine._thread.join, 10)
        assert not engine._thread.is_alive()
        assert faults.seen == [(Fault.STUCK, Fault.STUCK.value)]

    asyncio.run(inside())


def test_a_stop_during_a_stuck_step_ends(tiny: Tiny) -> None:
    faults, stuck, entered = Faults(), threading.Event(), threading.Event()
    engine = make_engine(tiny, step_timeout=0.5, on_fault=faults)

    def hang(batch: Batch) -> None:
        entered.set()
        stuck.wait(30)

    Seam.of(engine).before = hang

    async def inside() -> None:
        engine.start()
        task = asyncio.create_task(collect(engine.submit([request("a")])))
        await asyncio.to_thread(entered.wait, 10)
        await asyncio.wait_for(engine.stop(), 10)
        assert [output.error for _, output in await task] == [SHUTTING_DOWN], "not at once"
        await asyncio.to_thread(check_ended, engine, faults, Fault.STUCK)
        stuck.set()

    asyncio.run(inside())


def watchdogs() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "rivulet-watchdog"}


def test_slow_steps_and_rest_are_no_stuck_steps(tiny: Tiny) -> None:
    faults = Faults()
    others = watchdogs()  # of servers that other tests share
    engine = make_engine(tiny, step_timeout=1.0, on_fault=faults)
    engine._runner.seconds = 0.15  # type: ignore[attr-defined]

    async def work() -> None:
        outputs = await collect(engine.submit([request("a", max_tokens=9)]))
        assert reason_of(outputs) is FinishReason.LENGTH
        await asyncio.sleep(1.4)
        assert tokens_of(await collect(engine.submit([request("again", max_tokens=2)]))) != []
        assert not faults.seen

    run(engine, work)
    deadline = time.monotonic() + 5
    while watchdogs() - others:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("error", [ZeroDivisionError, Panic])
def test_a_fault_of_the_engine_itself_is_told_to_everyone(tiny: Tiny, error: type[BaseException]) -> None:
    faults = Faults()
    engine = make_engine(tiny, on_fault=faults)

    def update(batch: Batch, step: StepResult) -> list[object]:
        raise error

    async def work() -> None:
        submission = engine.submit([request("a", max_tokens=400), request("b", max_tokens=400)])
        outputs = aiter(submission)
        await anext(outputs)
        engine._scheduler.update = update  # type: ignore[assignment]
        rest = [output async for _, output in outputs]
        assert sum(output.finish_reason is FinishReason.STOPPED for output in rest) == 2
        await asyncio.to_thread(check_ended, engine, faults, Fault.FAILED)

    run(engine, work)


def test_a_model_that_fails_on_everything_is_a_fault(tiny: Tiny) -> None:
    faults = Faults()
    engine = make_engine(tiny, on_fault=faults)
    seam = Seam.of(engine)

    def gone(batch: Batch) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    async def work() -> None:
        await collect(engine.submit([request("good")]))
        seam.before = gone
        for index in range(BARREN_STEPS):
            assert engine.alive
            outputs = await collect(engine.submit([request(f"{index}"), request(f"{index} too")]))
            told = {output.error for _, output in outputs}
            assert told == {STEP_FAILED if index < BARREN_STEPS - 1 else Fault.FAILED.value}
        await asyncio.to_thread(check_ended, engine, faults, Fault.FAILED)

    run(engine, work)


def test_requests_that_fail_one_after_the_other_are_none(tiny: Tiny) -> None:
    """Whoever finds a request that makes the model raise cannot end the server with it."""
    faults = Faults()
    engine = make_engine(tiny, on_fault=faults)
    seam = Seam.of(engine)

    async def work() -> None:
        bad = [f"{index}" for index in range(3 * BARREN_STEPS)]
        seam.before = failing(set(bad))
        for name in bad:
            assert reason_of(await collect(engine.submit([request(name)]))) is FinishReason.ERROR
        assert engine.alive and not faults.seen
        await until_idle(engine)
        assert engine.healthy

    run(engine, work)


def test_health_is_won_back_by_a_request(tiny: Tiny) -> None:
    """One real token for all who ask at once, and none where the last step was good."""
    engine = make_engine(tiny)
    seam = Seam.of(engine)

    async def probes(count: int) -> Sequence[bool]:
        seam.batches.clear()
        return await asyncio.gather(*(engine.probe() for _ in range(count)))

    async def work() -> None:
        assert (engine.healthy, await probes(5), seam.batches) == (True, [True] * 5, [])
        seam.before = failing({"bad"})
        await collect(engine.submit([request("bad")]))
        assert not engine.healthy and engine.alive
        assert await probes(5) == [True] * 5
        assert engine.healthy
        assert [batch.num_tokens for batch in seam.batches] == [1]
        await collect(engine.submit([request("bad")]))

        def broken(batch: Batch) -> None:
            raise RuntimeError("for a while")

        seam.before = broken
        assert await probes(1) == [False]
        seam.before = nothing
        await collect(engine.submit([request("good")]))
        assert engine.healthy
        await until_idle(engine)

    run(engine, work)


def test_a_stopped_engine_says_so(tiny: Tiny) -> None:
    engine = make_engine(tiny)

    async def work() -> None:
        await engine.stop()
        with pytest.raises(Stopped, match=SHUTTING_DOWN):
            engine.submit([request("late")])
        assert not await engine.probe()
        assert engine.fault is None

    run(engine, work)
