"""The engine thread, and its asynchronous face: `submit` gives a stream of TokenOutputs.

The thread owns scheduler and runner; the event loop only hands over requests and aborts, and gets
each step's outputs in one call. Every request gets exactly one terminal output, whatever happens.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from model.batch import Batch, Chunk, SamplingParams, StepResult
from server.engine.admission import Admission, Overloaded
from server.engine.attempt import Outcome, attempt
from server.engine.pacer import Pacer
from server.engine.records import EngineStats, StepRecord
from server.engine.request import FinishReason, Request, TokenOutput
from server.engine.scheduler import Scheduler
from server.engine.speculator import Speculator
from server.engine.submission import Submission
from server.engine.watchdog import Watchdog

logger = logging.getLogger("rivulet.engine")

STEP_FAILED = "the model failed in the step that computed this request"
MEMORY_SHORT = "the server ran out of memory; try again later"
SHUTTING_DOWN = "the server is shutting down"

BARREN_STEPS = 3
"""After so many steps in a row that failed for everyone in them, the model itself is put to the test."""


class Fault(Enum):
    """Why an engine ended that nobody stopped, as clients are told it."""

    STUCK = "a step of the model does not end"
    FAILED = "the engine ended by a fault"


class Stopped(Exception):
    """The engine is not running (any more), its text says why; the request was not admitted."""


class ModelFailed(Exception):
    """The model fails on a single token, so that it is not the requests that are at fault."""


class StepRunner(Protocol):
    """What the engine needs of the model."""

    def execute(self, batch: Batch) -> StepResult:
        """Compute one step."""


class Engine:
    """Runs `scheduler` and `runner` in a thread of its own between `start` and `stop`.

    A fault ends it before: everyone who waits is told, and then `on_fault`, once and from another thread
    than the event loop's. A step counts as stuck after `step_timeout` seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        admission: Admission,
        *,
        speculator: Speculator | None = None,
        step_timeout: float = 120.0,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        on_fault: Callable[[Fault, str], None] = lambda fault, reason: None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._pacer = Pacer()
        self._speculator = speculator or Speculator()
        self.admission = admission
        self._on_step = on_step
        self._on_fault = on_fault
        self._watchdog = Watchdog(step_timeout, lambda: self._pulse, lambda: self._end(Fault.STUCK))
        self._beats = itertools.count()
        self._pulse: int | None = None  # another number for each execution; None while there is no work
        self._barren_steps = 0  # the last ones in a row that brought nothing for anyone
        self._probing = asyncio.Lock()
        self._places: dict[str, tuple[Submission, int]] = {}  # by request id; the event loop's
        self._wake = threading.Condition()
        self._arrivals: list[Request] = []  # these four are guarded by _wake
        self._departures: list[str] = []
        self._stopping = False
        self._fault: Fault | None = None
        self._outputs: list[tuple[str, TokenOutput]] = []  # of the last step; the thread's, until handed over
        self._over = asyncio.Event()  # the thread ended, or will never
        self._stats = EngineStats(blocks_total=scheduler.tables.num_blocks)
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

    @property
    def longest_wait(self) -> float:
        """Seconds that the oldest of the requests waits of which nothing was computed yet."""
        now = time.perf_counter()
        return now - min((s.submitted for s, _ in [*self._places.values()] if s.started is None), default=now)

    @property
    def fault(self) -> Fault | None:
        """Why it ended, if not by `stop`."""
        return self._fault

    @property
    def healthy(self) -> bool:
        """Whether its last step brought something for someone."""
        return self.alive and self._barren_steps == 0

    async def probe(self) -> bool:
        """Whether it generates: as its last step showed, or else as a request of one token shows now."""
        async with self._probing:
            if self.healthy or not self.alive:
                return self.healthy
            name = f"probe-{next(self._beats)}"
            try:
                submission = self.submit([Request(name, (0,), SamplingParams(), max_tokens=1)])
            except Overloaded:
                return False
            try:
                return [output.token is not None async for _, output in submission] == [True]
            finally:
                submission.close()

    def start(self) -> None:
        """Start the thread; call it from the running event loop that will submit."""
        assert self._thread is None
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="rivulet-engine", daemon=True)
        self._thread.start()
        self._watchdog.start()

    async def stop(self) -> None:
        """End the thread after its present step, unless that is stuck; who still waits is told at once."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._tell(SHUTTING_DOWN)
        if self._thread is not None:
            await self._over.wait()
            if self._fault is None:
                self._thread.join()
        self._watchdog.stop()

    def submit(self, requests: Sequence[Request]) -> Submission:
        """Admit requests together or not at all (Overloaded, Stopped); never waits."""
        if not self.alive:
            raise Stopped(self._fault.value if self._fault else SHUTTING_DOWN)
        self.admission.admit(requests)
        submission = Submission(requests, self.abort)
        for index, request in enumerate(requests):
            assert request.id not in self._places
            self._places[request.id] = (submission, index)
        with self._wake:
            self._arrivals.extend(requests)
            self._wake.notify()
        return submission

    def abort(self, request_id: str) -> None:
        """Forget a request and free its blocks within a step; an unknown or finished one is no error."""
        if not self._leave(request_id):
            return
        with self._wake:
            self._departures.append(request_id)
            self._wake.notify()

    def _deliver(self, outputs: list[tuple[str, TokenOutput]], begun: Sequence[str], now: float) -> None:
        """Pass on what a step brought; of those in `begun` the next one computes the prompts from now on."""
        for request_id, output in outputs:
            if request_id not in self._places:
                continue  # aborted while the step ran
            submission, index = self._places[request_id]
            if output.finish_reason is not None:
                self._leave(request_id)
            submission.put(index, output)
        for request_id in begun:
            if request_id in self._places:
                self.admission.start(request_id)
                submission, _ = self._places[request_id]
                submission.started = submission.started or now  # the first time counts

    def _leave(self, request_id: str) -> bool:
        """Give a request's place to others; whether it had one."""
        place = self._places.pop(request_id, None)
        if place is None:
            return False
        submission, index = place
        self.admission.leave(submission.requests[index])
        return True

    def _abandon(self, error: str) -> None:
        """Nothing will come any more, not even the end of the present step."""
        self._over.set()
        self._tell(error)

    def _tell(self, error: str) -> None:
        """Tell everyone who still waits that nothing will come any more."""
        for request_id, (submission, index) in list(self._places.items()):
            self._leave(request_id)
            submission.put(index, TokenOutput(finish_reason=FinishReason.STOPPED, error=error))

    def _end(self, fault: Fault) -> None:
        """End by a fault, on whatever thread it was found; only the first one counts."""
        with self._wake:
            if self._fault is not None:
                return
            self._fault = fault
            self._stopping = True
            self._wake.notify()
        logger.critical(fault.value)
        self._call(self._abandon, fault.value)
        self._on_fault(fault, fault.value)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        """Have a function called on the event loop, unless that was closed while a step ran."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        """The thread: serve until stopped; a fault of the engine itself ends it for everyone."""
        try:
            try:
                self._serve()
            finally:
                self._hand_over()
        except BaseException:  # a panic of a library in Rust is no Exception
            logger.critical("the engine's thread ended by an exception", exc_info=True)
            self._end(Fault.FAILED)
        else:
            self._call(self._over.set)

    def _serve(self) -> None:
        """Take what arrived, step, until stopped."""
        while True:
            if self._scheduler.idle:
                self._hand_over()
            with self._wake:
                while not (self._stopping or self._arrivals or self._departures) and self._scheduler.idle:
                    self._pulse = None
                    self._wake.wait()
                if self._stopping:
                    return
                self._pulse = next(self._beats)
                arrivals, self._arrivals = self._arrivals, []
                departures, self._departures = self._departures, []
            for request in arrivals:
                self._scheduler.add(request)
            for request_id in departures:
                self._scheduler.abort(request_id)
            self._step()
            self._stats = self._picture()

    def _hand_over(self, begun: Sequence[str] = ()) -> None:
        """Have what the last step brought delivered.

        That is done when the next step begins, not when the last one ends. The interpreter runs one thread at
        a time: between two steps the event loop would hold this one up, during a step it has it to itself.
        """
        if self._outputs or begun:
            outputs, self._outputs = self._outputs, []
            self._call(self._deliver, outputs, begun, time.perf_counter())

    def _step(self) -> None:
        """One step: schedule, hand over what the one before brought, execute, update."""
        began = time.perf_counter()
        scheduler = self._scheduler
        decoding = scheduler.decoding
        if self._speculator.computes:
            self._hand_over()  # it is a step of its own
        guesses = self._speculator.guesses(decoding)
        rows = self._pacer.prefill_rows(len(decoding), scheduler.num_newcomers)
        batch = scheduler.schedule(rows, guesses)
        if batch is None:
            self._scheduler.check()
            return
        prefilled = [chunk.request_id for chunk in batch.chunks if chunk.start < chunk.prompt_length]
        started = time.perf_counter()
        self._hand_over(prefilled)
        outcome = attempt(batch, self._execute, self._scheduler.newest)
        executed = time.perf_counter()
        if outcome.smooth:
            decodes = sum(chunk.count - chunk.guesses == 1 for chunk in batch.chunks)
            prefill_rows = batch.num_tokens - batch.num_guesses - decodes
            self._pacer.record(decodes, prefill_rows, executed - started)
            if not prefill_rows:
                self._speculator.record(decodes, batch.num_guesses, executed - began)
        outputs = self._scheduler.fail(outcome.failed, FinishReason.ERROR, STEP_FAILED)
        outputs += self._scheduler.fail(outcome.shed, FinishReason.SHED, MEMORY_SHORT)
        proposed = accepted = 0
        for part, step in outcome.computed:
            outputs += self._scheduler.update(part, step)
            proposed += part.num_guesses
            accepted += step.num_accepted
        self._note_health(outcome)
        ended = time.perf_counter()
        self._on_step(
            StepRecord(
                seconds=executed - started,
                rows=batch.num_tokens,
                sequences=len(batch.chunks),
                prefills=len(prefilled),
                whole_seconds=ended - began,
                update_seconds=ended - executed,
                failed=not outcome.smooth,
                shed=len(outcome.shed),
                proposed=proposed,
                accepted=accepted,
                proposer=self._speculator.name,
            )
        )
        self._outputs = outputs

    def _execute(self, batch: Batch) -> StepResult:
        """Run the model; the watchdog counts from here."""
        self._pulse = next(self._beats)
        return self._runner.execute(batch)

    def _note_health(self, outcome: Outcome) -> None:
        """Count the steps that brought nothing (ModelFailed if the requests cannot be the reason)."""
        self._barren_steps = 0 if outcome.computed else self._barren_steps + 1
        if self._barren_steps < BARREN_STEPS:
            return
        tables = self._scheduler.tables.borrow()
        if tables is None:
            return  # others hold them all: their steps will tell
        try:
            self._execute(Batch((Chunk("probe", (0,), 0, 1, tables, 1, SamplingParams()),)))
        except Exception as error:
            raise ModelFailed from error
        finally:
            self._scheduler.tables.give(tables)
        self._barren_steps = 0

    def _picture(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            blocks_used=scheduler.tables.num_used,
            blocks_total=scheduler.tables.num_blocks,
            promised_tokens=scheduler.promised_tokens,
            scheduler=scheduler.stats,
        )
