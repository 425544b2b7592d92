"""What state the process is in, in one object that /ready, /health and the admission of requests read.

Any thread may read it and move it on; nothing moves it back. Knows nothing of HTTP, signals or exits.
"""

import time
from dataclasses import dataclass
from enum import Enum

from server.engine.engine import Fault
from server.phases import Phases


class State(Enum):
    """In the words of /ready."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """Told to end: what runs may finish, nothing new begins."""
    STUCK = "stuck"
    FAILED = "failed"


FAULTS = {Fault.STUCK: State.STUCK, Fault.FAILED: State.FAILED}


@dataclass(frozen=True, slots=True)
class Condition:
    """A state and why."""

    state: State
    reason: str
    progress: float | None = None
    """How much of the loading phase is done, from 0 to 1, where it can tell."""

    @property
    def healthy(self) -> bool:
        """Whether the process does its work; one that drains does, and must not be killed for it."""
        return self.state in (State.READY, State.DRAINING)


class Lifecycle:
    """From loading to ready to draining; or to a fault, from which nothing leads away."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._condition: Condition | None = None  # while loading it changes with the phases
        self._drained_by: float | None = None

    @property
    def condition(self) -> Condition:
        """The present one."""
        if self._condition is not None:
            return self._condition
        phases = self._phases
        return Condition(State.LOADING, f"the model is loading: {phases.current}", phases.fraction)

    @property
    def state(self) -> State:
        """The present one."""
        return self.condition.state

    def drained(self, running: int) -> bool:
        """Whether it was told to end, and what runs is over or has had its time."""
        return self._drained_by is not None and (running == 0 or time.monotonic() >= self._drained_by)

    def ready(self) -> None:
        """The model is loaded; requests are served from now on."""
        assert self.state is State.LOADING
        self._condition = Condition(State.READY, "requests are served")

    def drain(self, seconds: float) -> None:
        """Refuse what is new; what runs may take so many seconds."""
        if self.state is State.READY:
            self._drained_by = time.monotonic() + seconds
            self._condition = Condition(State.DRAINING, "the server is shutting down")

    def fail(self, fault: Fault, reason: str) -> None:
        """The engine will not compute any more."""
        self._condition = Condition(FAULTS[fault], reason)
