"""A request on its way through the engine: what was asked, where it stands, what it yields.

Token ids only; text begins in `server.text`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from model.batch import Constraint, SamplingParams, Token


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to be continued, fully validated."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    """Output tokens at most; 0 only scores the prompt."""
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end the output; empty to ignore them."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the output because the client named them."""
    constraint: Constraint | None = None
    """What the output must match."""
    client: str = ""
    """Who sent it: the queue lets clients take turns."""
    fork_of: str | None = None
    """A request of the same prompt and adapter, added before, whose computed prompt is to be shared."""
    adapter: int = 0
    """Number of the adapter that it is computed with, from 1; 0 is the model itself."""

    def __post_init__(self) -> None:
        assert self.prompt_ids and self.max_tokens >= 0 and self.adapter >= 0


class FinishReason(Enum):
    """Why a request's output ended."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"
    LENGTH = "length"
    ERROR = "error"
    """The model failed on it."""
    SHED = "shed"
    """Given up because memory was short; the same request may succeed later."""
    STOPPED = "stopped"
    """The engine ended, and the request with it."""


class TokenOutput(NamedTuple):
    """What one step brought for one request; the last one carries the finish reason."""

    token: Token | None = None
    prompt_tokens: tuple[Token, ...] = ()
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were reused from the prefix cache."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    guessed: bool = False
    """Whether the token came in a step with others before it, since they had been guessed."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's mutable state; only the scheduler writes it."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    """Prompt and output."""
    num_computed: int = 0
    """So many tokens have their keys and values in the cache."""
    block_tables: tuple[list[int], ...] = ()
    """By cache group; none while it holds no block."""
    given_back: list[int] = field(default_factory=list)
    """By cache group: so many blocks of the table's beginning are holes."""
    contents: list[bytes] = field(default_factory=list)
    """Names of what the full blocks of computed tokens hold, with those before them."""
    cached_tokens: int = 0
    num_scored: int = 0
    """Prompt tokens whose log-probability was told; a recomputation does not tell it again."""
    leader: "Sequence | None" = None
    """Whose computed prompt this one is to share: a fork's, until it is admitted."""
    forks: list["Sequence"] = field(default_factory=list)
    """Forks held back until this one's prompt is computed."""
    forked: bool = False
    """Whether it shares a prompt that its leader computed."""

    def __post_init__(self) -> None:
        self.token_ids.extend(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens still to compute before the next one can be chosen."""
        return len(self.token_ids) - self.num_computed

    @property
    def most_guesses(self) -> int:
        """Tokens that may be guessed ahead: the last one needs none, and a constraint sees one at a time."""
        if self.request.constraint is not None:
            return 0
        return max(0, self.request.max_tokens - self.num_output - 1)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_length
