"""The phases of the start: which one is running, how far it is, and how long each took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Phases:
    """What the start has done and does; written by the thread that loads, read by any."""

    seconds: dict[str, float] = field(default_factory=dict)
    current: str = "start"
    fraction: float | None = None
    """How much of the current phase is done, where it can tell."""

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a phase."""
        self.current, self.fraction = name, None
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{parts}; {sum(self.seconds.values()):.1f} s in all"
