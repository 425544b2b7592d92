"""The engine thread, and its asynchronous face: `submit` gives a stream of TokenOutputs.

The thread owns scheduler and runner; the event loop only hands over requests and aborts, and gets
each step's outputs in one call. Every request gets exactly one terminal output, whatever happens.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from model.batch import Batch, StepResult
from server.engine.request import FinishReason, Request, TokenOutput
from server.engine.scheduler import Scheduler, SchedulerStats

logger = logging.getLogger("rivulet.engine")

STEP_FAILED = "the model failed in the step that computed this request"


class Overloaded(Exception):
    """The queue is full; the request was not admitted."""


class Stopped(Exception):
    """The engine is not running (any more); the request was not admitted."""


class StepRunner(Protocol):
    """What the engine needs of the model."""

    def execute(self, batch: Batch) -> StepResult:
        """Compute one step."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine is doing, as of the last finished step."""

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    promised_tokens: int = 0
    """Tokens that the running requests may come to, prompts and outputs."""
    scheduler: SchedulerStats = field(default_factory=SchedulerStats)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step, for the metrics."""

    seconds: float
    """Of the model alone."""
    rows: int
    sequences: int
    prefills: int = 0
    """Sequences of which the step computed prompt tokens."""
    whole_seconds: float = 0.0
    """With the scheduling before it and the bookkeeping after it."""
    update_seconds: float = 0.0
    """The bookkeeping: tokens appended, the finished taken out."""
    failed: bool = False


class Submission:
    """Requests that were admitted together: iterate over their outputs, and close it in any case.

    Closing is idempotent and frees the requests' blocks within a step, wherever they stand.
    """

    def __init__(self, engine: "Engine", requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self.submitted = time.perf_counter()
        self.started: float | None = None
        """When the first of the requests was first computed."""
        self._engine = engine
        self._open = set(range(len(requests)))
        # Bounded by what the requests may generate, so it needs no bound of its own.
        self._outputs: asyncio.Queue[tuple[int, TokenOutput]] = asyncio.Queue()

    def put(self, index: int, output: TokenOutput) -> None:
        """Take an output for the request at `index` from the engine (on the event loop)."""
        self._outputs.put_nowait((index, output))

    async def __aiter__(self) -> AsyncIterator[tuple[int, TokenOutput]]:
        """(Index of the request, output) in order; each request's last carries its finish reason."""
        while self._open:
            index, output = await self._outputs.get()
            if index not in self._open:
                continue  # computed before the engine learnt that the request was cancelled
            if output.finish_reason is not None:
                self._open.discard(index)
            yield index, output

    def cancel(self, index: int) -> None:
        """Give one request up, if it is still running; no output of it follows."""
        if index in self._open:
            self._open.discard(index)
            self._engine.abort(self.requests[index].id)

    def close(self) -> None:
        """Give up whatever is still running."""
        for index in list(self._open):
            self.cancel(index)


class Engine:
    """Runs `scheduler` and `runner` in a thread of its own between `start` and `stop`."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        max_waiting: int,
        on_step: Callable[[StepRecord], None] = lambda record: None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._max_waiting = max_waiting
        self._on_step = on_step
        self._places: dict[str, tuple[Submission, int]] = {}  # by request id; the event loop's
        self._wake = threading.Condition()
        self._arrivals: list[Request] = []  # these three are guarded by _wake
        self._departures: list[str] = []
        self._stopping = False
        self._stats = EngineStats(blocks_total=scheduler.pool.num_blocks)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def stats(self) -> EngineStats:
        """A consistent picture, replaced as a whole after each step."""
        return self._stats

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @property
    def num_requests(self) -> int:
        """Requests admitted and neither finished nor given up."""
        return len(self._places)

    def start(self) -> None:
        """Start the thread; call it from the running event loop that will submit."""
        assert self._thread is None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="rivulet-engine", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present step; whoever is still waiting is told an error."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        self._abandon("the server is shutting down")

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Admit requests together or not at all (Overloaded, Stopped); never waits."""
        if not self.alive:
            raise Stopped("the engine is not running")
        capacity = self._scheduler.max_running + self._max_waiting
        if len(self._places) + len(requests) > capacity:
            raise Overloaded(f"{len(self._places)} of {capacity} places are taken")
        submission = Submission(self, requests)
        for index, request in enumerate(requests):
            assert request.id not in self._places
            self._places[request.id] = (submission, index)
        with self._wake:
            self._arrivals.extend(requests)
            self._wake.notify()
        return submission

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks within a step; an unknown or finished one is no error."""
        if self._places.pop(request_id, None) is None:
            return
        with self._wake:
            self._departures.append(request_id)
            self._wake.notify()

    def _note_start(self, request_ids: list[str], now: float) -> None:
        """These requests' prompts are being computed; the first time counts."""
        for request_id in request_ids:
            if request_id in self._places:
                submission, _ = self._places[request_id]
                submission.started = submission.started or now

    def _deliver(self, outputs: list[tuple[str, TokenOutput]]) -> None:
        for request_id, output in outputs:
            if request_id not in self._places:
                continue  # aborted while the step ran
            submission, index = self._places[request_id]
            if output.finish_reason is not None:
                del self._places[request_id]
            submission.put(index, output)

    def _abandon(self, error: str) -> None:
        """Tell everyone who still waits that nothing will come any more."""
        for submission, index in self._places.values():
            submission.put(index, TokenOutput(finish_reason=FinishReason.ERROR, error=error))
        self._places.clear()

    def _run(self) -> None:
        """The thread: serve until stopped; a fault of the engine itself ends it for everyone."""
        assert self._loop is not None
        try:
            self._serve(self._loop)
        except Exception:
            logger.critical("the engine ended by a fault of its own", exc_info=True)
            self._stopping = True
            self._loop.call_soon_threadsafe(self._abandon, "the engine ended by a fault of its own")

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take what arrived, step, deliver, until stopped."""
        while True:
            with self._wake:
                while not (self._stopping or self._arrivals or self._departures) and self._scheduler.idle:
                    self._wake.wait()
                if self._stopping:
                    return
                arrivals, self._arrivals = self._arrivals, []
                departures, self._departures = self._departures, []
            for request in arrivals:
                self._scheduler.add(request)
            for request_id in departures:
                self._scheduler.abort(request_id)
            outputs = self._step()
            self._stats = self._picture()
            if outputs:
                with contextlib.suppress(RuntimeError):  # the loop was closed while the step ran
                    loop.call_soon_threadsafe(self._deliver, outputs)

    def _step(self) -> list[tuple[str, TokenOutput]]:
        """One step: schedule, execute, update."""
        began = time.perf_counter()
        batch = self._scheduler.schedule()
        if batch is None:
            self._scheduler.check()
            return []
        prefilled = [chunk.request_id for chunk in batch.chunks if chunk.start < chunk.prompt_length]
        started = time.perf_counter()
        if prefilled and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                self._loop.call_soon_threadsafe(self._note_start, prefilled, started)
        try:
            step = self._runner.execute(batch)
        except Exception:
            logger.exception("a step of %d sequences failed", len(batch.chunks))
            self._on_step(StepRecord(0.0, batch.num_tokens, len(batch.chunks), len(prefilled), failed=True))
            return self._scheduler.fail(batch, STEP_FAILED)
        executed = time.perf_counter()
        outputs = self._scheduler.update(batch, step)
        ended = time.perf_counter()
        self._on_step(
            StepRecord(
                seconds=executed - started,
                rows=batch.num_tokens,
                sequences=len(batch.chunks),
                prefills=len(prefilled),
                whole_seconds=ended - began,
                update_seconds=ended - executed,
            )
        )
        return outputs

    def _picture(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            blocks_used=scheduler.pool.num_used,
            blocks_total=scheduler.pool.num_blocks,
            promised_tokens=scheduler.promised_tokens,
            scheduler=scheduler.stats,
        )
