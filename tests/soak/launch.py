"""`rivulet serve` with a saboteur in it: python -m soak.launch JOURNAL SEED SECONDS serve ...

All is the real server but for the model's step, which now and then raises, runs out of memory or takes long.
What was done is appended to the journal, a line each, before it is done. SIGUSR1 appends the number of tasks;
after SIGUSR2 nothing is spoiled any more.
"""

import asyncio
import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from random import Random
from typing import Any

from model.batch import Batch, StepResult
from model.errors import OutOfMemory
from model.runner import Runner
from server import cli

APART = 0.2
"""Seconds between two faults, at least."""
STALL = 0.5
"""Seconds that a step takes longer."""

Step = Callable[[Any, Batch], StepResult]


class Journal:
    """Lines for whoever watches from outside."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def note(self, line: str) -> None:
        """Written when this returns."""
        os.write(self._file, f"{line}\n".encode())

    def note_fault(self, name: str) -> None:
        """With the time, of a clock that is the same in every process."""
        self.note(f"fault {time.monotonic()} {name}")

    def count_tasks(self, signal_number: int, frame: object) -> None:
        """A signal's handler; the event loop turns in another thread."""
        tasks = [thing for thing in gc.get_objects() if isinstance(thing, asyncio.Task)]
        self.note(f"tasks {sum(not task.done() for task in tasks)}")


class Saboteur:
    """Stands before a step and spoils some, by a seeded clock."""

    def __init__(self, step: Step, journal: Journal, random: Random, seconds: float) -> None:
        self._step = step
        self._journal = journal
        self._random = random
        self._seconds = seconds
        self._next = time.monotonic() + seconds
        self._poison: str | None = None
        """A request on which every step fails."""

    def rest(self, signal_number: int, frame: object) -> None:
        """Spoil nothing any more; a signal's handler."""
        self._next = math.inf

    def execute(self, runner: Runner, batch: Batch) -> StepResult:
        """The step, or a fault instead of it."""
        now = time.monotonic()
        if now >= self._next:
            # Never one right after the other: several steps in a row that fail are the model's own fault.
            self._next = now + APART + self._random.expovariate(1 / self._seconds)
            self._random.choice((self._fail, self._exhaust, self._stall, self._choose))(batch)
        if any(chunk.request_id == self._poison for chunk in batch.chunks):
            raise RuntimeError("the saboteur poisoned a request")
        return self._step(runner, batch)

    def _fail(self, batch: Batch) -> None:
        self._journal.note_fault("a step fails")
        raise RuntimeError("the saboteur spoiled a step")

    def _exhaust(self, batch: Batch) -> None:
        self._journal.note_fault("no memory")
        raise OutOfMemory("the saboteur took all")

    def _stall(self, batch: Batch) -> None:
        self._journal.note_fault("a step takes long")
        time.sleep(STALL)

    def _choose(self, batch: Batch) -> None:
        self._journal.note_fault("a poisoned request")
        self._poison = self._random.choice(batch.chunks).request_id


def main() -> int:
    """Serve."""
    path, seed, seconds, *arguments = sys.argv[1:]
    journal = Journal(path)
    signal.signal(signal.SIGUSR1, journal.count_tasks)
    if float(seconds) > 0:
        saboteur = Saboteur(Runner.execute, journal, Random(seed), float(seconds))
        signal.signal(signal.SIGUSR2, saboteur.rest)
        Runner.execute = lambda runner, batch: saboteur.execute(runner, batch)  # type: ignore[method-assign]
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
