"""Who sent a request, and when: made once at the door, handed on to whatever counts, logs or shares out.

The same object is at hand in a context variable for what no argument reaches: log lines and error bodies.
"""

import secrets
import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Course:
    """How a generation went; moments are of time.perf_counter, None if it did not come to them."""

    submitted: float
    started: float | None
    """Its first step."""
    first: float | None
    """Its first token."""
    ended: float
    fates: tuple[str, ...]
    """How each output ended."""
    error: str | None
    """Why there is no whole answer."""


@dataclass(slots=True)
class Tally:
    """What a request comes to, noted while it is served, for its line in the log and for its trace."""

    keeps_texts: bool = False
    prompt_tokens: int | None = None
    """None where nothing was generated."""
    output_tokens: int = 0
    inputs: list[str] = field(default_factory=list)
    """Texts, if they are kept: one a prompt."""
    outputs: list[str] = field(default_factory=list)
    course: Course | None = None
    """Once the generation is over."""

    def begin(self, prompt_tokens: int, inputs: Iterable[str], num_outputs: int) -> None:
        """A generation was admitted; `inputs` are looked at only if texts are kept."""
        self.prompt_tokens = prompt_tokens
        if self.keeps_texts:
            self.inputs, self.outputs = list(inputs), [""] * num_outputs

    def count_token(self, index: int, text: str) -> None:
        """One more token, and the text that it completed in the output at `index`."""
        self.output_tokens += 1
        if self.keeps_texts:
            self.outputs[index] += text


@dataclass(frozen=True, slots=True)
class Caller:
    """One request's sender."""

    client: str = "local"
    """What fairness counts by: the name of the key, or the address."""
    request_id: str = field(default_factory=lambda: secrets.token_hex(8))
    received: float = field(default_factory=time.perf_counter)
    """By time.perf_counter."""
    tally: Tally = field(default_factory=Tally)


PIECES = "rivulet.pieces"
"""The ASGI extension that has the server's own `send`: once an answer's head went through the middleware,
which looks at nothing else, the pieces of a stream need not pass each of its layers."""

CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)
