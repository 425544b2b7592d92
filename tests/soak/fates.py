"""How a request may end: each ends in exactly one of these, or the soak fails with what it saw."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

BREAKS = frozenset({"a step fails", "no memory", "a poisoned request", "told to end"})
"""Faults of which requests may be told."""
CROWDS = frozenset({"crowd of connections", "no descriptors"})
"""Faults under which a new connection may be closed at once."""


class Fate(Enum):
    """Every end that is promised."""

    ANSWERED = "answered"
    """Whole, and what was asked for."""
    BUSY = "told to wait"
    """429 with Retry-After."""
    REFUSED = "refused"
    """As what it was has to be."""
    TOO_SLOW = "too slow"
    """Closed by the server at a deadline."""
    LEFT = "left"
    """The client went by itself."""
    FAULTED = "faulted"
    """Told that the model failed, because it was made to."""
    TURNED_AWAY = "no room"
    """Closed or 503 while there were too many connections or too few descriptors."""


class Wrong(Exception):
    """An end that is none of the promised ones, as one sentence."""


@dataclass(slots=True)
class Ledger:
    """What became of every request so far."""

    ends: Counter[tuple[str, Fate]] = field(default_factory=Counter)
    wrongs: list[str] = field(default_factory=list)
    canaries: list[float] = field(default_factory=list)
    """When those known answers were asked for that came as they had to."""

    def count(self, kind: str, fate: Fate) -> None:
        """A client of this kind came to this end."""
        self.ends[kind, fate] += 1

    def blame(self, sentence: str) -> None:
        """Something broke a promise."""
        self.wrongs.append(sentence)

    @property
    def requests(self) -> int:
        """All that ended in a known way."""
        return sum(self.ends.values())

    def by_fate(self, fate: Fate) -> int:
        """Of all kinds."""
        return sum(number for (_, each), number in self.ends.items() if each is fate)


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was done to the server, by this machine's monotonic clock."""

    name: str
    began: float
    ended: float


@dataclass(slots=True)
class Faults:
    """What was done so far; whatever fails is excused only by one of these while it ran."""

    inside: Callable[[], list[Fault]]
    """Those that the saboteur has noted."""
    outside: list[Fault] = field(default_factory=list)
    running: dict[str, float] = field(default_factory=dict)

    @property
    def done(self) -> list[Fault]:
        """All that are over."""
        return self.outside + self.inside()

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """A fault from outside, as long as the block runs."""
        began = self.running[name] = time.monotonic()
        try:
            yield
        finally:
            del self.running[name]
            self.outside.append(Fault(name, began, time.monotonic()))

    def excuse_failure(self, text: str, since: float) -> Fate:
        """A request was told that the model failed: so it may be, if the model was made to (Wrong)."""
        if not self.touched(BREAKS, since):
            raise Wrong(f"failed, though nothing was done to it: {text}")
        return Fate.FAULTED

    def excuse_connection(self, error: Exception, since: float) -> Fate:
        """A connection broke: so it may, if there were too many (Wrong)."""
        if not self.touched(CROWDS, since):
            raise Wrong(f"a connection broke: {error!r}")
        return Fate.TURNED_AWAY

    def touched(self, names: frozenset[str], since: float) -> bool:
        """Whether one of these ran at any time since then."""
        return bool(names & self.running.keys()) or any(
            fault.name in names and fault.ended >= since for fault in self.done
        )
