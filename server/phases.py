"""How long each phase of the start takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Phases:
    """How long each phase of the start took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a phase."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())
        return f"{parts}; {sum(self.seconds.values()):.1f} s in all"
