"""Who sent a request, and when: made once at the door, handed on to whatever counts, logs or shares out.

The same object is at hand in a context variable for what no argument reaches: log lines and error bodies.
"""

import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Caller:
    """One request's sender."""

    client: str = "local"
    """What fairness counts by: the name of the key, or the address."""
    request_id: str = field(default_factory=lambda: secrets.token_hex(8))
    received: float = field(default_factory=time.perf_counter)
    """By time.perf_counter."""


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)
